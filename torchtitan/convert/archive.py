"""PyTorch's file format, read and written one tensor at a time.

`torch.save` writes a zip archive: a pickle that names storages, and a record with the bytes of each. A `.pth` is one
such archive, and so is every tensor of a DCP checkpoint. `torch.load` and `torch.save` keep all of it in memory.
"""

import io
import mmap
import os
import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch._utils import _rebuild_tensor_v2

from torchtitan.convert.weights import Weight, bytes_of

PIECE = 16 * 2**20
ALIGNMENT = 64  # what torch.save takes, so that mapped storages are aligned
STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
"""How the pickle names a dtype."""


@dataclass(frozen=True)
class Stored:
    """A tensor in an archive: a view of the storage in record `data/{key}`, as `torch.as_strided` makes one."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]
    offset: int


class Archive:
    """An archive in a file.

    Attributes:
        content: what was saved, with a `Stored` in the place of each tensor.
    """

    def __init__(self, path: Path, offset: int = 0, length: int | None = None) -> None:
        """Opens the archive that fills the file, or these bytes of it.

        Raises:
            ValueError: where it is none, is truncated, or holds anything but tensors and plain values.
            OSError: where the file cannot be read.
        """
        self.path = path
        self._window = _Window(path, offset, length)
        try:
            self._zip = zipfile.ZipFile(self._window)
            self._folder = self._zip.namelist()[0].partition("/")[0]
            if f"{self._folder}/byteorder" in self._zip.namelist() and self._record("byteorder") != b"little":
                raise ValueError(f"{path} was written on a machine of the other byte order")
            description = io.BytesIO(self._record("data.pkl"))
        except (zipfile.BadZipFile, IndexError, KeyError, EOFError) as error:
            raise ValueError(f"{path} is truncated, or not a file of torch.save: {error}") from error
        try:
            self.content: Any = _Unpickler(description).load()
        except Exception as error:  # whatever a damaged pickle makes of itself
            raise ValueError(f"{path} cannot be read: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._window.close()

    def read(self, stored: Stored) -> torch.Tensor:
        """A tensor of `content`. Its memory is the file's, mapped: writing to it would not change the file.

        Raises:
            ValueError: where the stored bytes are not those that have their checksum.
        """
        if not prod(stored.shape):
            return torch.empty(stored.shape, dtype=stored.dtype)
        try:
            data = self._map(self._zip.getinfo(f"{self._folder}/data/{stored.key}"))
            storage = torch.frombuffer(data, dtype=torch.uint8)
            if storage.data_ptr() % stored.dtype.itemsize:  # archives within files begin anywhere
                storage = storage.clone()
            return storage.view(stored.dtype).as_strided(stored.shape, stored.stride, stored.offset)
        except (KeyError, ValueError, RuntimeError) as error:  # no such record, or a view beyond its end
            raise ValueError(f"{self.path} is damaged: {error}") from error

    def _record(self, name: str) -> bytes:
        return self._zip.read(f"{self._folder}/{name}")

    def _map(self, record: zipfile.ZipInfo) -> memoryview:
        """The bytes of a record, mapped: to be given memory for a copy of them would take longer than all the rest."""
        self._window.seek(record.header_offset)
        header = self._window.read(30) or b""
        begin = record.header_offset + 30 + int.from_bytes(header[26:28], "little")
        begin += int.from_bytes(header[28:30], "little")
        stored = record.compress_type == zipfile.ZIP_STORED and record.compress_size == record.file_size
        if not stored or begin + record.file_size > self._window.length:
            raise ValueError(f"{record.filename} is not stored as it is, or not all of it")
        begin += self._window.offset
        surplus = begin % mmap.ALLOCATIONGRANULARITY
        length = surplus + record.file_size
        mapped = mmap.mmap(self._window.file.fileno(), length, access=mmap.ACCESS_COPY, offset=begin - surplus)
        mapped.madvise(mmap.MADV_WILLNEED)
        data = memoryview(mapped)[surplus:]
        if zlib.crc32(data) != record.CRC:
            raise ValueError(f"{record.filename} does not have its checksum")
        return data


def write_tensors(file: BinaryIO, weights: dict[str, Weight], tensors: Iterable[torch.Tensor]) -> None:
    """Writes what `torch.save` of a dictionary would; `tensors` gives one at a time, in the order of `weights`."""
    content = {name: _Written(str(key), weight) for key, (name, weight) in enumerate(weights.items())}
    description = io.BytesIO()
    _Pickler(description, protocol=2).dump(content)
    with zipfile.ZipFile(file, "w") as archive:
        # Without a `.format_version`: with it, PyTorch computes where records lie from the habits of its own writer.
        for name, text in (("data.pkl", description.getvalue()), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), text)
        for written, tensor in zip(content.values(), tensors, strict=True):
            assert (tuple(tensor.shape), tensor.dtype) == (written.weight.shape, written.weight.dtype)
            data = bytes_of(tensor.contiguous())
            with archive.open(_aligned(f"archive/data/{written.key}", file.tell()), "w", force_zip64=True) as record:
                for start in range(0, len(data), PIECE):
                    record.write(data[start : start + PIECE])


def _aligned(name: str, position: int) -> zipfile.ZipInfo:
    """A record whose data begin on a multiple of ALIGNMENT: its header gets a field of padding, as PyTorch's do."""
    record = zipfile.ZipInfo(name)
    header = 30 + len(name) + 20 + 4  # fixed part, name, sizes of 64 bits, head of the padding
    padding = -(position + header) % ALIGNMENT
    record.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
    return record


class _Unpickler(pickle.Unpickler):
    """Builds a `Stored` for each tensor, and plain values; it knows no other names."""

    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return STORAGES[name] if module == "torch" else _BUILDERS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, for which weights have no use; nothing of it was run"
            ) from None

    def persistent_load(self, pid: Any, /) -> Any:
        _, dtype, key, _, _ = pid
        return key, dtype


def _build_tensor(storage: tuple[str, torch.dtype], offset: int, shape: Any, stride: Any, *_: Any) -> Stored:
    return Stored(storage[0], tuple(shape), storage[1], tuple(stride), offset)


_BUILDERS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _build_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
}


@dataclass(frozen=True)
class _Written:
    """A tensor whose bytes record `data/{key}` will hold."""

    key: str
    weight: Weight


@dataclass(frozen=True)
class _Storage:
    written: _Written


class _Pickler(pickle.Pickler):
    """Pickles each `_Written` as the tensor that it will be."""

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        key, weight = obj.written.key, obj.written.weight
        kind = next(name for name, dtype in STORAGES.items() if dtype == weight.dtype)
        return "storage", getattr(torch, kind), key, "cpu", weight.nbytes // weight.dtype.itemsize

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Written):
            return NotImplemented
        shape = obj.weight.shape
        return _rebuild_tensor_v2, (_Storage(obj), 0, shape, _contiguous(shape), False, OrderedDict())


class _Window(io.RawIOBase):
    """Some bytes of a file as a file of their own."""

    def __init__(self, path: Path, offset: int, length: int | None) -> None:
        super().__init__()
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115
        self.offset, self.position = offset, 0
        self.length = os.fstat(self.file.fileno()).st_size - offset if length is None else length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any, /) -> int:
        wanted = memoryview(buffer)[: max(0, self.length - self.position)]
        count = 0
        while count < len(wanted):
            read = os.preadv(self.file.fileno(), [wanted[count:]], self.offset + self.position + count)
            if not read:
                break
            count += read
        self.position += count
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor of that shape."""
    return torch.empty(shape, device="meta").stride()
