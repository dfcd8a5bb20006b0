"""The choice of attention kernels, and what the CPU can show of them."""

import pytest
import torch

from torchtitan.models.llama.attention import Documents, choose_attention

CPU = torch.device("cpu")


def test_auto_takes_pytorchs_own_on_a_cpu_and_says_why() -> None:
    chosen = choose_attention("auto", CPU, torch.float32)
    assert chosen.backend.title == "PyTorch's scaled_dot_product_attention"
    assert "there is no GPU" in chosen.reason


@pytest.mark.parametrize("name", ["fa3", "fa4", "cudnn"])
def test_a_backend_asked_for_by_name_that_cannot_run_is_an_error_with_the_remedy(name: str) -> None:
    with pytest.raises(ValueError, match=f'model.attention = "{name}".*there is no GPU.*To install it'):
        choose_attention(name, CPU, torch.bfloat16)


def test_grouped_heads_equal_repeated_ones() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 33, heads, 16) for heads in (8, 2, 2))
    attend = choose_attention("sdpa", CPU, torch.float32)
    repeated = attend(q, k.repeat_interleave(4, dim=2), v.repeat_interleave(4, dim=2))
    torch.testing.assert_close(attend(q, k, v), repeated)


def test_documents_from_starts() -> None:
    documents = Documents.from_starts(torch.tensor([0, 3, 8], dtype=torch.int32), 10, CPU)
    assert documents.offsets.tolist() == [0, 3, 8, 10]
    assert documents.offsets.dtype == torch.int32
    assert (documents.lengths, documents.longest) == ([3, 5, 2], 5)
