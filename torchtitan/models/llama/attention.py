"""Causal attention: the kernels there are, the choice among them, and documents within a window."""

import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

HALF_PRECISION = (torch.bfloat16, torch.float16)

# Newer versions of torch want shared key and value heads announced; 2.11 does not know the keyword.
_VARLEN_GQA: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


@dataclass(frozen=True)
class Documents:
    """The recordings that a batch's sequences consist of, one after another.

    Attributes:
        offsets: first token of each, and the number of all tokens, int32 [documents + 1] on the batch's device.
        lengths: tokens of each.
        longest: tokens of the longest.
    """

    offsets: torch.Tensor
    lengths: list[int]
    longest: int

    @classmethod
    def from_starts(cls, starts: torch.Tensor, num_tokens: int, device: torch.device) -> "Documents":
        """From the first token of each document, int32 in host memory, and the number of all tokens."""
        offsets = torch.cat((starts, torch.tensor([num_tokens], dtype=torch.int32)))
        lengths = offsets.diff().tolist()
        return cls(offsets.to(device, non_blocking=True), lengths, max(lengths))


@dataclass(frozen=True)
class Backend:
    """A set of attention kernels.

    Attributes:
        title: its name for people.
        sdpa: which kernels `scaled_dot_product_attention` may take.
        flash_impl: what has to be activated first; None for what PyTorch brings along.
        min_capability, max_capability: CUDA compute capabilities (major) that it is written for; 0: CPU too.
        half_precision: whether it needs bf16 or fp16.
        install: how to get it.
    """

    title: str
    sdpa: tuple[SDPBackend, ...]
    flash_impl: str | None = None
    min_capability: int = 0
    max_capability: int = 99
    half_precision: bool = True
    install: str = "it is part of PyTorch's CUDA builds"

    def activate(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Puts its kernels into use. Returns why it cannot run there, None where it can."""
        if self.min_capability:
            if device.type != "cuda":
                return "there is no GPU"
            major, minor = torch.cuda.get_device_capability(device)
            if not self.min_capability <= major <= self.max_capability:
                name = torch.cuda.get_device_name(device)
                return f"it is not written for {name} (compute capability {major}.{minor})"
        if self.half_precision and dtype not in HALF_PRECISION:
            return f"it computes in bfloat16, training.mixed_precision_param is {str(dtype).removeprefix('torch.')}"
        if self.flash_impl is not None:
            try:
                with warnings.catch_warnings():
                    # That PyTorch's own kernels are overridden is what is asked for here.
                    warnings.simplefilter("ignore")
                    activate_flash_attention_impl(self.flash_impl)
            except (ImportError, RuntimeError, OSError) as error:
                return f"it is not installed ({str(error).splitlines()[0]})"
        return None


BACKENDS = {
    "fa3": Backend(
        title="FlashAttention-3",
        sdpa=(SDPBackend.FLASH_ATTENTION,),
        flash_impl="FA3",
        min_capability=9,
        max_capability=9,
        install="git clone https://github.com/Dao-AILab/flash-attention && "
        "cd flash-attention/hopper && python setup.py install",
    ),
    "fa4": Backend(
        title="FlashAttention-4",
        sdpa=(SDPBackend.FLASH_ATTENTION,),
        flash_impl="FA4",
        min_capability=9,
        install="pip install flash-attn-4",
    ),
    "cudnn": Backend(title="cuDNN attention", sdpa=(SDPBackend.CUDNN_ATTENTION,), min_capability=8),
    "sdpa": Backend(
        title="PyTorch's scaled_dot_product_attention",
        sdpa=(SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
        half_precision=False,
    ),
}


@dataclass(frozen=True)
class Attention:
    """The attention that was chosen: call it with queries, keys and values."""

    backend: Backend
    reason: str

    def describe(self, device: torch.device, *, document_mask: bool) -> str:
        """Which kernels run, and why these, for the log."""
        chosen = f"{self.backend.title} ({self.reason})"
        if not document_mask:
            return chosen
        return f"{chosen}; each recording by itself, {'varlen_attn' if device.type == 'cuda' else 'one after another'}"

    def __call__(
        self, q_BLHD: torch.Tensor, k_BLHD: torch.Tensor, v_BLHD: torch.Tensor, documents: Documents | None = None
    ) -> torch.Tensor:
        """Causal attention [batch, length, heads, head_dim]; k and v may have fewer heads, dividing those of q.

        With `documents` a token sees only its own document's; they partition the batch·length tokens.
        """
        if documents is None:
            with sdpa_kernel(list(self.backend.sdpa)):
                return _causal(q_BLHD, k_BLHD, v_BLHD)
        q, k, v = (x.flatten(0, 1) for x in (q_BLHD, k_BLHD, v_BLHD))
        if q.is_cuda and q.dtype in HALF_PRECISION:
            out = varlen_attn(
                q,
                k,
                v,
                documents.offsets,
                documents.offsets,
                documents.longest,
                documents.longest,
                window_size=(-1, 0),
                **_VARLEN_GQA,
            )
            assert isinstance(out, torch.Tensor)
        else:
            out = _each_document(q, k, v, documents)
        return out.view_as(q_BLHD)


def choose_attention(requested: str, device: torch.device, dtype: torch.dtype) -> Attention:
    """The attention for `model.attention` = `requested` on this device.

    Raises:
        ValueError: where it was asked for by name and cannot run.
    """
    if requested != "auto":
        backend = BACKENDS[requested]
        obstacle = backend.activate(device, dtype)
        if obstacle is not None:
            raise ValueError(
                f'model.attention = "{requested}": {backend.title} cannot run: {obstacle}. '
                f'To install it: {backend.install}. Or set model.attention = "auto"'
            )
        return Attention(backend, "asked for by name")

    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    passed_over = []
    for name in ("fa3" if hopper else "fa4", "cudnn", "sdpa"):
        backend = BACKENDS[name]
        obstacle = backend.activate(device, dtype)
        if obstacle is None:
            return Attention(backend, "; ".join(["the first that can run", *passed_over]))
        passed_over.append(f"not {backend.title}: {obstacle}")
    raise AssertionError("scaled_dot_product_attention runs everywhere")


def _causal(q_BLHD: torch.Tensor, k_BLHD: torch.Tensor, v_BLHD: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
    shared_heads = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared_heads).transpose(1, 2)


# Each set of lengths would be a compilation of its own.
@torch.compiler.disable()
def _each_document(q_THD: torch.Tensor, k_THD: torch.Tensor, v_THD: torch.Tensor, documents: Documents) -> torch.Tensor:
    """Where there is no kernel for packed documents: one after another."""
    pieces = zip(*(x.unsqueeze(0).split(documents.lengths, dim=1) for x in (q_THD, k_THD, v_THD)), strict=True)
    return torch.cat([_causal(q, k, v) for q, k, v in pieces], dim=1)
