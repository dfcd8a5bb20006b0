"""The documentation's tables are those of the results, and kernels find their families."""

import pytest

from benchmarks.kernel_families import family
from benchmarks.table import PAGE, load_results, with_tables


def test_the_tables_are_made_from_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page) == page, "run: python -m benchmarks.table"


def test_profiles_account_for_the_whole_step() -> None:
    profiles = [result["profile"] for result in load_results().values() if result["profile"]]
    assert profiles
    for profile in profiles:
        known = sum(share for name, share in profile["families"].items() if name != "other")
        assert known > 0.97


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<…", "attention"),
        ("nvjet_sm90_tst_192x192_64x4_1x2_h_bz_coopB_TNN", "matrix products"),
        ("triton_poi_fused__unsafe_view_mul_silu_4", "fused by torch.compile"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("Memcpy DtoH (Device -> Pinned)", "copies to or from the host"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<…", "optimizer and gradient norm"),
        ("something new", "other"),
    ],
)
def test_kernels_find_their_family(kernel: str, name: str) -> None:
    assert family(kernel) == name
