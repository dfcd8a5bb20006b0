"""Reading ahead changes nothing but the time."""

import pytest
import torch

from torchtitan.convert import ahead
from torchtitan.convert.ahead import reading_ahead
from torchtitan.convert.weights import Tensors, Weight


def tensors(reads: list[str], sizes: list[int]) -> Tensors:
    """Each tensor is filled with its number; what is read is noted."""
    weights = {str(number): Weight((size,), torch.float32) for number, size in enumerate(sizes)}

    def read(name: str) -> torch.Tensor:
        reads.append(name)
        if name == "13":
            raise ValueError("13 is damaged")
        return torch.full(weights[name].shape, float(name))

    return Tensors(weights, read)


@pytest.mark.parametrize("order", [range(9), [3, 4, 5, 0, 1, 8, 7, 6, 2]], ids=["in order", "in another"])
def test_the_same_tensors(order: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "LARGEST", 4 * 5)  # the larger half is not read ahead
    sizes, reads = list(range(1, 10)), []
    with reading_ahead(tensors(reads, sizes)) as found:
        for number in order:
            assert torch.equal(found.read(str(number)), torch.full((sizes[number],), float(number)))
    if order == range(9):
        assert reads == [str(number) for number in order]


def test_an_error_comes_with_its_own_tensor() -> None:
    with reading_ahead(tensors([], [1] * 15)) as found:
        for number in range(13):
            found.read(str(number))
        with pytest.raises(ValueError, match="13 is damaged"):
            found.read("13")
