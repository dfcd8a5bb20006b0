"""What a checkpoint says of itself: `checkpoint.json`, without which a folder is none.

It lists every file with its size and checksums beside step, model, data cursor, configuration and versions, and ends
with a checksum of its own.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import xxhash

RECORD = "checkpoint.json"
FORMAT = 3
BY_HAND = 1
"""Format of a record without files and checksums, as one writes to adopt another program's weights."""
CHUNK = 1 << 20  # stays in the processor's cache

Record = dict[str, Any]
"""format, kind, step, model shape, data cursor, configuration, versions, and `files`."""
Segments = list[list[int]]
"""[length, XXH3 of 64 bits] of each item of a file, which follow each other without gaps.

A CRC-32 takes as long as the writing; XXH3 (https://xxhash.com) a tenth of that."""
Files = dict[str, Segments]


class DamagedCheckpointError(ValueError):
    """A checkpoint that must not be used, with the reason."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(f"{folder} is damaged: {reason}")
        self.folder, self.reason = folder, reason

    def __reduce__(self) -> tuple[Any, ...]:
        """It travels between ranks."""
        return type(self), (self.folder, self.reason)


class OtherFormatError(ValueError):
    """A checkpoint of another version of this program: it may be good, but cannot be read here."""

    def __init__(self, folder: Path, format: object) -> None:
        super().__init__(
            f"{folder} was written in format {format}, and this version reads and writes format {FORMAT}: go on with "
            "the version that wrote it, or begin a new run from its weights, exported by that version"
        )
        self.folder, self.format = folder, format

    def __reduce__(self) -> tuple[Any, ...]:
        """It travels between ranks."""
        return type(self), (self.folder, self.format)


def write_manifest(folder: Path, record: Record) -> None:
    """Writes the record to disk, and makes sure that it is there."""
    head = json.dumps({"format": FORMAT, **record}, indent=None, separators=(",\n ", ": "))[:-1]
    with open(folder / RECORD, "w", encoding="ascii") as file:
        file.write(head + _own_checksum(head.encode()))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def read_manifest(folder: Path) -> Record:
    """The record of a checkpoint whose files are all there at their full sizes.

    Raises:
        DamagedCheckpointError: where the record is absent, is not as it was written, or where a file is absent or has
            another size.
        OtherFormatError: where another version wrote it.
    """
    record = read_record(folder)
    if record is None:
        raise DamagedCheckpointError(folder, f"it has no {RECORD}")
    if "files" not in record:
        raise DamagedCheckpointError(folder, f"its {RECORD} lists no files")
    for name, segments in record["files"].items():
        size, path = sum(length for length, _ in segments), folder / name
        if not path.is_file():
            raise DamagedCheckpointError(folder, f"{name} is absent")
        if path.stat().st_size != size:
            raise DamagedCheckpointError(folder, f"{name} has {path.stat().st_size:,} bytes instead of {size:,}")
    return record


def read_record(folder: Path) -> Record | None:
    """What a folder says of itself; None where it says nothing, as other programs' checkpoints.

    Raises:
        DamagedCheckpointError: where the record is not as it was written.
        OtherFormatError: where another version wrote it.
    """
    path = folder / RECORD
    try:
        content = path.read_bytes()
        record = json.loads(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(folder, f"{RECORD} cannot be read: {error}") from error
    if isinstance(record, dict) and record.get("format") == BY_HAND and "files" not in record:
        return record
    head = content[: content.rfind(b',\n "sha256": ')]
    if content != head + _own_checksum(head).encode():
        raise DamagedCheckpointError(folder, f"{RECORD} is not as it was written: its checksum is another")
    if record["format"] != FORMAT:
        raise OtherFormatError(folder, record["format"])
    return record


def check_file(folder: Path, name: str, segments: Segments) -> None:
    """Reads a file of the checkpoint, and compares all of it with its checksums.

    Raises:
        DamagedCheckpointError: where it differs, or cannot be read.
    """
    try:
        with open(folder / name, "rb", buffering=0) as file:
            position = 0
            for length, expected in segments:
                if _checksum(file, length) != expected:
                    raise DamagedCheckpointError(folder, f"{name} differs from its checksum behind byte {position:,}")
                position += length
    except OSError as error:
        raise DamagedCheckpointError(folder, f"{name} cannot be read: {error.strerror}") from error


def checksum_file(path: Path) -> Segments:
    """The one segment that a whole file is."""
    size = path.stat().st_size
    with open(path, "rb", buffering=0) as file:
        return [[size, _checksum(file, size)]]


def offsets(segments: Segments) -> Iterator[tuple[int, int]]:
    """(offset, checksum) of each segment."""
    position = 0
    for length, checksum in segments:
        yield position, checksum
        position += length


def sync_folder(folder: Path) -> None:
    """Makes sure that the names in the folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(file: FileIO, length: int) -> int:
    checksum, buffer = xxhash.xxh3_64(), memoryview(bytearray(min(length, CHUNK)))
    while length > 0:
        count = file.readinto(buffer[:length])
        if not count:
            return -1
        checksum.update(buffer[:count])
        length -= count
    return checksum.intdigest()


def _own_checksum(head: bytes) -> str:
    return f',\n "sha256": "{hashlib.sha256(head).hexdigest()}"}}\n'
