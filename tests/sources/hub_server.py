"""A tiny Hugging Face Hub on the loopback address: enough of it for the real client to list and fetch one model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

REPO = "acme/tiny"
COMMIT = "c0ffee" + "0" * 34


class Hub:
    """What the server has (`files`), what it does wrong, and what it was asked for (`asked`)."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.commit = COMMIT
        self.damaged: dict[str, bytes] = {}  # name -> what is sent in place of the file
        self.gated = False
        self.asked: list[str] = []
        self.url = ""

    def fetched(self) -> set[str]:
        """Names of the files whose content was asked for."""
        return {
            path.split("/", 5)[5]
            for method, path in map(str.split, self.asked)
            if method == "GET" and "/resolve/" in path
        }

    def entry(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        entry: dict[str, Any] = {"size": len(data), "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
        if name.endswith((".safetensors", ".gguf", ".bin")):
            entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
        return entry

    def info(self) -> dict[str, Any]:
        siblings = [{"rfilename": n, **e, "blobId": e["oid"]} for n in self.files for e in [self.entry(n)]]
        return {
            "_id": "1",
            "id": REPO,
            "modelId": REPO,
            "sha": self.commit,
            "siblings": siblings,
            "private": False,
            "tags": [],
        }

    def tree(self) -> list[dict[str, Any]]:
        entries = []
        for name in self.files:
            entry = self.entry(name)
            if "lfs" in entry:
                entry["lfs"]["oid"] = entry["lfs"].pop("sha256")
            entries.append({"type": "file", "path": name, **entry})
        return entries


@contextmanager
def serve(hub: Hub) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            if hub.gated:
                return self.send(403, b"{}", body, {"X-Error-Code": "GatedRepo"})
            if path.startswith(f"/api/models/{REPO}"):
                if "revision" in parts and parts[-1] not in ("main", hub.commit):
                    return self.send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
                return self.send(200, json.dumps(hub.tree() if "tree" in parts else hub.info()).encode(), body)
            if path.startswith(f"/{REPO}/resolve/{hub.commit}/") and (name := "/".join(parts[4:])) in hub.files:
                entry, data = hub.entry(name), hub.damaged.get(name, hub.files[name])
                headers = {"X-Repo-Commit": hub.commit, "ETag": f'"{entry["oid"]}"'}
                if "lfs" in entry:
                    headers |= {"X-Linked-ETag": f'"{entry["lfs"]["sha256"]}"', "X-Linked-Size": str(entry["size"])}
                return self.send(200, data, body, headers)
            return self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

        def send(self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
