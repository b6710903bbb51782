"""A Hub of kernel repositories on the loopback address: enough of it for the real client to look at them and to fetch files.

`tests/sources/hub_server.py` is the same for one model; kernels have other addresses, versions as branches, and trees.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

from tests import loopback


class Hub:
    """Commits with their files, branches that name a commit, and what was asked for."""

    def __init__(self) -> None:
        self.url = ""
        self.clear()

    def clear(self) -> None:
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.sent_instead: dict[str, bytes] = {}  # path in the repository -> what is sent in its place
        self.asked: list[str] = []

    def commit(self, repo: str, files: dict[str, bytes], branch: str) -> str:
        data = json.dumps({n: hashlib.sha256(d).hexdigest() for n, d in files.items()}, sort_keys=True)
        commit = hashlib.sha1(f"{repo} {branch} {data}".encode()).hexdigest()
        self.commits[repo, commit] = dict(files)
        self.branches.setdefault(repo, {})[branch] = commit
        return commit

    def resolve(self, repo: str, revision: str) -> str | None:
        revision = self.branches.get(repo, {}).get(revision, revision)
        return revision if (repo, revision) in self.commits else None

    def entries(self, repo: str, commit: str, below: str, recursive: bool) -> list[dict[str, Any]]:
        found, folders = [], set()
        for path, data in self.commits[repo, commit].items():
            if below and not path.startswith(f"{below}/"):
                continue
            inner = path[len(below) + 1 :] if below else path
            if "/" in inner and not recursive:
                folders.add(f"{below}/{inner.split('/')[0]}".strip("/"))
                continue
            oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": oid}
            if path.endswith((".so", ".bin")):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
            found.append(entry)
        return found + [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in sorted(folders)]

    def answer(self, method: str, url: str) -> loopback.Answer:
        parts, query = unquote(urlsplit(url).path).strip("/").split("/"), urlsplit(url).query
        self.asked.append(f"{method} /{'/'.join(parts)}")
        if parts[:2] == ["api", "kernels"]:
            repo, rest = "/".join(parts[2:4]), parts[4:]
            if repo not in self.branches:
                return 404, b"{}", {"X-Error-Code": "RepoNotFound"}
            if rest == ["refs"]:
                refs = [
                    {"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in self.branches[repo].items()
                ]
                return 200, json.dumps({"branches": refs, "converts": [], "tags": []}).encode(), {}
            commit = self.resolve(repo, rest[1] if len(rest) > 1 else "main")
            if commit is None:
                return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
            if rest[:1] == ["tree"]:
                tree = self.entries(repo, commit, "/".join(rest[2:]), "recursive=true" in query.lower())
                return 200, json.dumps(tree).encode(), {}
            return 200, json.dumps({"_id": "1", "id": repo, "author": "a", "sha": commit}).encode(), {}
        if parts[0] == "kernels" and len(parts) > 5 and parts[3] == "resolve":
            repo, path = "/".join(parts[1:3]), "/".join(parts[5:])
            commit = self.resolve(repo, parts[4])
            if commit is None or path not in self.commits[repo, commit]:
                return 404, b"{}", {"X-Error-Code": "EntryNotFound"}
            data = self.sent_instead.get(path, self.commits[repo, commit][path])
            return 200, data, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        return 404, b"{}", {"X-Error-Code": "RepoNotFound"}


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    with loopback.serve(hub.answer) as hub.url:
        yield hub
