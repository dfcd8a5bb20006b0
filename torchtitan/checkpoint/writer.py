"""Writes DCP checkpoints that can be verified: each item with a checksum, each file seen to be whole on disk."""

import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import xxhash
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from torchtitan.checkpoint.manifest import Files, checksum_file

PIECE = 1 << 17
"""Bytes that are written and summed up at a time."""


@dataclass(frozen=True)
class CheckedResult(WriteResult):
    """DCP's account of a written item, and its checksum."""

    checksum: int


class CheckedWriter(FileSystemWriter):
    """DCP's writer, of one save. PyTorch's own loses write errors of its threads, and knows no checksums.

    Rank 0 ends with `commit(files)`, where all files, with sizes and checksums, are on disk. What it raises, and what
    a write on any rank raises, DCP raises on all ranks.
    """

    def __init__(self, folder: Path, commit: Callable[[Files], None]) -> None:
        super().__init__(folder)
        self.folder, self.commit = folder, commit

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's items one after the other into one file, and waits until it is on disk."""
        results: list[WriteResult] = []
        if plan.items:
            name = f"{plan.storage_data.prefix}0.distcp"
            with open(self.folder / name, "xb", buffering=0) as file, ThreadPoolExecutor(1) as beside:
                stream = ChecksummingStream(file)
                for item, content in _on_host(plan.items, planner):
                    offset = stream.position
                    stream.checksum.reset()
                    stream.take(content)
                    length = stream.position - offset
                    place = _StorageInfo(name, offset, length)
                    results.append(CheckedResult(item.index, length, place, stream.checksum.intdigest()))
                    if hasattr(os, "posix_fadvise"):  # else the system begins to write to the disk when told to sync
                        beside.submit(os.posix_fadvise, file.fileno(), offset, length, os.POSIX_FADV_DONTNEED)
                os.fsync(file.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0: checks that everything that was planned is on disk, writes `.metadata`, and commits.

        Raises:
            OSError: where something is missing.
        """
        written = [result for of_one_rank in results for result in of_one_rank]
        missing = _planned(metadata) - {result.index for result in written}
        if missing:
            raise OSError(f"{len(missing)} items have not been written, {next(iter(missing)).fqn} among them")
        files: Files = {}
        for result in written:
            assert isinstance(result, CheckedResult)
            files.setdefault(result.storage_data.relative_path, []).append([result.size_in_bytes, result.checksum])
        for name, segments in files.items():
            size, expected = (self.folder / name).stat().st_size, sum(length for length, _ in segments)
            if size != expected:
                raise OSError(f"{name} has {size:,} bytes on disk, and {expected:,} were written")
        super().finish(metadata, results)
        files[".metadata"] = checksum_file(self.folder / ".metadata")
        self.commit(files)


class ChecksummingStream:
    """A file that is written, and the checksum of what has been written since that was last reset."""

    def __init__(self, file: BinaryIO | Any) -> None:
        self.file = file
        self.position, self.checksum = 0, xxhash.xxh3_64()
        self.error: OSError | None = None

    def take(self, content: torch.Tensor | io.BytesIO) -> None:
        """Writes a tensor, or bytes, as DCP's reader expects them."""
        if not isinstance(content, torch.Tensor):
            self.write(content.getbuffer())
            return
        try:
            torch.save(content, cast(BinaryIO, self))
        except RuntimeError as error:
            # It closes its archive in spite of an error, and complains about that instead.
            raise self.error or error from None

    def write(self, data: bytes | memoryview) -> int:
        """Writes all of `data`, bytes; each piece is summed up while it is in the processor's cache."""
        view = memoryview(data).cast("B")
        for start in range(0, view.nbytes, PIECE):
            piece = view[start : start + PIECE]
            self._write_all(piece)
            self.checksum.update(piece)
        self.position += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Nothing is held back."""

    def _write_all(self, view: memoryview) -> None:
        try:
            while view.nbytes:
                view = view[self.file.write(view) :]  # an unbuffered file may take less than all
        except OSError as error:
            self.error = error
            raise


def _on_host(items: Iterable[WriteItem], planner: SavePlanner) -> Iterator[tuple[WriteItem, torch.Tensor | io.BytesIO]]:
    """Each item with its content in host memory; the next one is copied from the GPU while one is written."""
    ahead: tuple[WriteItem, torch.Tensor | io.BytesIO, torch.cuda.Event | None] | None = None
    for item in [*items, None]:
        copied = None
        if item is not None:
            content, copying = planner.resolve_data(item), None
            if isinstance(content, torch.Tensor):
                content = content.detach()
                if content.is_cuda:
                    content = content.to("cpu", non_blocking=True)
                    copying = torch.cuda.Event()
                    copying.record()
                elif content.untyped_storage().nbytes() != content.numel() * content.element_size():
                    content = content.clone()  # torch.save writes the whole storage of a tensor that is a part of it
            copied = (item, content, copying)
        if ahead is not None:
            if ahead[2] is not None:
                ahead[2].synchronize()
            yield ahead[0], ahead[1]
        ahead = copied


def _planned(metadata: Metadata) -> set[MetadataIndex]:
    planned = set()
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            planned |= {MetadataIndex(name, chunk.offsets) for chunk in entry.chunks}
        else:
            planned.add(MetadataIndex(name))
    return planned
