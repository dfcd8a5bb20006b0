"""A Hugging Face Hub on this machine: as much of its API as `huggingface_hub` uses to push a model."""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.http_server import Handler, serving

TOKEN = "hf_a-token-that-nobody-may-see"
"""The only login that it knows."""


@dataclass
class Hub:
    """What the server holds, and what came to it."""

    endpoint: str = ""
    private: dict[str, bool] = field(default_factory=dict)  # of each repository
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # of each repository, as committed
    objects: dict[str, bytes] = field(default_factory=dict)  # large files by SHA-256, committed or not
    requests: list[str] = field(default_factory=list)
    break_all_but: int | None = None  # uploads of so many objects get through, all others break off halfway
    begun: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Handler(Handler):
    hub: Hub

    def handle_request(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        if self.command == "PUT":
            self._receive_object(path.rpartition("/")[2])
            return
        body = self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials"}, 401)
        elif path == "/api/whoami-v2":
            self.answer({"name": "somebody", "type": "user"})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            self._plan_objects(json.loads(body))
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".pth")) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            self._commit(found[1], [json.loads(line) for line in body.splitlines()])
        elif (found := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path)) and found[1] in self.hub.private:
            self.answer({"id": found[1], "private": self.hub.private[found[1]], "sha": "0" * 40, "siblings": []})
        else:
            self.answer({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'somebody'}/{wanted['name']}"
        exists = name in self.hub.private
        if not exists:
            self.hub.private[name] = wanted.get("visibility") == "private" or wanted.get("private") is True
            self.hub.files[name] = {}
        self.answer({"url": f"{self.hub.endpoint}/{name}", "name": name}, 409 if exists else 200)

    def _plan_objects(self, wanted: dict[str, Any]) -> None:
        """Git LFS's batch API: where to put what is not there yet."""
        objects = [
            {"oid": o["oid"], "size": o["size"]}
            if o["oid"] in self.hub.objects
            else {**o, "actions": {"upload": {"href": f"{self.hub.endpoint}/objects/{o['oid']}"}}}
            for o in wanted["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def _receive_object(self, oid: str) -> None:
        limit = self.hub.break_all_but
        with self.hub.lock:
            if limit is None or len(self.hub.begun) < limit:
                self.hub.begun.add(oid)
        if oid not in self.hub.begun:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            # Reset, as by a router that forgets the connection.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.objects[oid] = content
        self.answer({})

    def _commit(self, name: str, operations: list[dict[str, Any]]) -> None:
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                self.hub.files[name][value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                self.hub.files[name][value["path"]] = self.hub.objects[value["oid"]]
        self.answer({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A server while the block lasts, and what it holds."""
    hub = Hub()
    with serving(type("HubHandler", (_Handler,), {"hub": hub})) as hub.endpoint:
        yield hub
