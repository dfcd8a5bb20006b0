"""Reads DCP checkpoints without running what is in them, and compares what it reads with its checksums.

`.metadata` is a pickle, and so is every item that is not a tensor; PyTorch's own reader runs whatever they contain, and
takes every byte as it comes.
"""

import io
import os
import pathlib
import pickle
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
import xxhash
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, filesystem, metadata
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from torchtitan.checkpoint.manifest import DamagedCheckpointError, Files, check_file, offsets

ALLOWED = {
    **{
        (kind.__module__, kind.__qualname__): kind
        for kind in (
            Metadata,
            MetadataIndex,
            StorageMeta,
            metadata.BytesStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.TensorProperties,
            metadata.TensorStorageMetadata,
            metadata._MEM_FORMAT_ENCODING,
            filesystem._StorageInfo,
            torch.Size,
            torch.serialization._get_layout,
            OrderedDict,
        )
    },
    # Where the checkpoint was written; `pathlib._local` is their home in Python 3.13.
    **{
        (module, name): getattr(pathlib, f"Pure{name}")
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath")
    },
}
"""What a `.metadata` may name, by module and name; PyTorch's dtypes come to it."""

READERS = 4
"""Items that a process reads at once: each is read, summed up, unpacked and copied, at the speed of one core."""


class SafeReader(FileSystemReader):
    """DCP's reader, for a checkpoint whose writer is not trusted: see `read_metadata`.

    What is read of the files in `files`, those of its manifest, is compared with their checksums; where it differs,
    a DamagedCheckpointError is raised.
    """

    def __init__(self, path: str | os.PathLike[str], files: Files | None = None) -> None:
        super().__init__(path)
        self.files = files or {}
        self.checksums = {
            (name, offset): checksum for name, segments in self.files.items() for offset, checksum in offsets(segments)
        }

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the checkpoint holds, and where; nothing but PyTorch's own descriptions of tensors is built for it.

        Raises:
            ValueError: where `.metadata` cannot be read, is damaged, names anything else, or points outside of the
                checkpoint's folder.
        """
        path = Path(self.path) / ".metadata"
        if path.name in self.files:
            check_file(path.parent, path.name, self.files[path.name])
        try:
            with open(path, "rb") as file:
                found = _MetadataUnpickler(file).load()
            places = {info.relative_path for info in found.storage_data.values()}
            outside = [place for place in places if not _stays_inside(place)]
        except Exception as error:  # whatever a damaged pickle makes of itself
            raise ValueError(f"{path} cannot be read: {error}") from error
        if outside:
            raise ValueError(f"{path} points outside of its folder: {', '.join(sorted(outside))}")
        # What the base class does: checkpoints of PyTorch before 2.3 have none, and a load is told by its id.
        found.storage_meta = getattr(found, "storage_meta", None) or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads this rank's items into their places, in the order in which they lie on the disk, several at once."""

        def place(item: ReadItem) -> tuple[str, int]:
            info = self.storage_data[item.storage_index]
            return info.relative_path, info.offset

        items, read = sorted(plan.items, key=place), super().read_data
        with ThreadPoolExecutor(READERS) as readers:
            parts = [replace(plan, items=items[first::READERS]) for first in range(READERS)]
            for done in [readers.submit(read, part, planner) for part in parts]:
                done.result()
        finished: Future[None] = Future()
        finished.set_result(None)
        return finished

    def _slice_file(self, file: IO[bytes], sinfo: filesystem._StorageInfo) -> IO[bytes]:
        """The bytes of one item: what the base class reads all items through."""
        if sinfo.relative_path not in self.files:
            return super()._slice_file(file, sinfo)
        file.seek(sinfo.offset)
        content = file.read(sinfo.length)
        if xxhash.xxh3_64_intdigest(content) != self.checksums.get((sinfo.relative_path, sinfo.offset)):
            raise DamagedCheckpointError(
                Path(self.path), f"{sinfo.relative_path} differs from its checksum behind byte {sinfo.offset:,}"
            )
        return io.BytesIO(content)


class SafeLoadPlanner(DefaultLoadPlanner):
    """DCP's planner, for a checkpoint whose writer is not trusted."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Puts an item that is not a tensor into the state; only tensors and Python's plain values are built.

        Raises:
            pickle.UnpicklingError: where it holds anything else.
        """
        name, loaded = read_item.dest_index.fqn, torch.load(value, weights_only=True)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, for which the description of a checkpoint has no use; nothing of it was run"
            ) from None


def _stays_inside(relative_path: str) -> bool:
    path = PurePosixPath(relative_path)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts
