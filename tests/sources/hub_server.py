"""A tiny Hugging Face Hub on the loopback address: enough of it for the real client to list and fetch one model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

from tests import loopback

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

    def answer(self, method: str, url: str) -> loopback.Answer:
        path = unquote(urlsplit(url).path)
        self.asked.append(f"{method} {path}")
        parts = path.strip("/").split("/")
        if self.gated:
            return 403, b"{}", {"X-Error-Code": "GatedRepo"}
        if path.startswith(f"/api/models/{REPO}"):
            if "revision" in parts and parts[-1] not in ("main", self.commit):
                return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
            return 200, json.dumps(self.tree() if "tree" in parts else self.info()).encode(), {}
        if path.startswith(f"/{REPO}/resolve/{self.commit}/") and (name := "/".join(parts[4:])) in self.files:
            entry, data = self.entry(name), self.damaged.get(name, self.files[name])
            headers = {"X-Repo-Commit": self.commit, "ETag": f'"{entry["oid"]}"'}
            if "lfs" in entry:
                headers |= {"X-Linked-ETag": f'"{entry["lfs"]["sha256"]}"', "X-Linked-Size": str(entry["size"])}
            return 200, data, headers
        return 404, b"{}", {"X-Error-Code": "RepoNotFound"}


@contextmanager
def serve(hub: Hub) -> Iterator[None]:
    with loopback.serve(hub.answer) as hub.url:
        yield
