"""Google's blob storage on this machine: as much of its JSON API as `blobfile` uses to list, read, write and remove."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.http_server import Handler, serving

TIME = "2026-01-01T00:00:00.000Z"


@dataclass
class Storage:
    """Contents by bucket and name, the names in the order in which they were written, and uploads under way."""

    endpoint: str = ""
    blobs: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)


class _Handler(Handler):
    storage: Storage

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        body = self.body()
        if found := re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", url.path):
            key = f"{found[1]}/{json.loads(body)['name']}"
            self.storage.uploads[key] = b""
            self.answer({}, Location=f"{self.storage.endpoint}/resume?key={key}")
        elif url.path == "/resume":
            self._receive(query["key"], body)
        elif found := re.fullmatch(r"/storage/v1/b/([^/]+)/o", url.path):
            self._list(found[1], query)
        elif found := re.fullmatch(r"/storage/v1/b/([^/]+)/o/(.+)", url.path):
            self._blob(f"{found[1]}/{unquote(found[2])}", query)
        else:
            self.answer({"name": url.path.rpartition("/")[2]})  # of a bucket

    def _receive(self, key: str, piece: bytes) -> None:
        self.storage.uploads[key] += piece
        if self.headers["Content-Range"].endswith("/*"):
            self.answer({}, 308)
            return
        self.storage.blobs.pop(key, None)
        self.storage.blobs[key] = self.storage.uploads.pop(key)
        self.answer(self._item(key))

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix = query.get("prefix", "")
        names = [key.partition("/")[2] for key in self.storage.blobs if key.startswith(f"{bucket}/{prefix}")]
        deeper = {name for name in names if "delimiter" in query and "/" in name[len(prefix) :]}
        folders = {prefix + name[len(prefix) :].partition("/")[0] + "/" for name in deeper}
        items = [self._item(f"{bucket}/{name}") for name in names if name not in deeper]
        self.answer({"items": items, "prefixes": sorted(folders)})

    def _blob(self, key: str, query: dict[str, str]) -> None:
        if key not in self.storage.blobs:
            self.answer({}, 404)
        elif self.command == "DELETE":
            del self.storage.blobs[key]
            self.answer(b"", 204)
        elif query.get("alt") == "media":
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            self.answer(self.storage.blobs[key][int(first) : int(last) + 1 if last else None], 206)
        else:
            self.answer(self._item(key))

    def _item(self, key: str) -> dict[str, Any]:
        size = str(len(self.storage.blobs[key]))
        return {"name": key.partition("/")[2], "size": size, "updated": TIME, "timeCreated": TIME, "generation": "1"}


@contextmanager
def running_storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """A storage that `gs://` URLs lead to while the block lasts."""
    storage = Storage()
    monkeypatch.setenv("BLOBFILE_FORCE_GOOGLE_ANONYMOUS_AUTH", "1")
    with serving(type("StorageHandler", (_Handler,), {"storage": storage})) as storage.endpoint:
        monkeypatch.setattr("blobfile._gcp.GCP_BASE_URL", storage.endpoint)
        yield storage
