"""Paths as names: short enough for a picture, and still different from each other."""

from collections.abc import Sequence
from pathlib import PurePath


def shorten(text: str, length: int) -> str:
    """The end of a path or sentence that is too long, after an ellipsis, if possible from a slash on."""
    if len(text) <= length:
        return text
    end = text[-(length - 1) :]
    slash = end.find("/")
    return "…" + (end[slash:] if 0 <= slash < length // 2 else end)


def distinct_names(paths: Sequence[str]) -> list[str]:
    """The paths without the parts that all begin or end with; of equal ones, and of one alone, the last part."""
    parts = [PurePath(path).parts for path in paths]
    shared = max(min(map(len, parts), default=0) - 1, 0)
    front = next((i for i in range(shared) if len({one[i] for one in parts}) > 1), shared)
    back = next((i for i in range(shared - front) if len({one[-1 - i] for one in parts}) > 1), shared - front)
    return ["/".join(one[front : len(one) - back]) for one in parts]
