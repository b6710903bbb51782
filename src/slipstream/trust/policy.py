"""kernels-policy.toml: whose code may run here at all. What it does not list is refused."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from slipstream.config.paths import config_root
from slipstream.errors import TrustError
from slipstream.trust import record
from slipstream.trust.lock import Lock, Pin, is_repo
from slipstream.trust.signature import ANY, Signer, matches

LOCK = "kernels.lock"
POLICY = "kernels-policy.toml"
HUB = "https://huggingface.co"
_KEYS = {
    "repos", "sources", "endpoint", "require_signatures", "trusted_root", "minimum_versions", "signers",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Policy:
    """What may be loaded. `Policy()` refuses everything; `denied` says why where it is not simply empty.

    Attributes:
        repos: patterns such as kernels-community/*.
        hub: whether anything may come from the Hub; what is in the cache already came from there.
        folders: kernels in folders must lie below one of these.
        endpoint: the Hub or its mirror; HF_ENDPOINT does not change it.
        trusted_root: the Sigstore keys, where not those inside the installed package.
        recorded: repository -> the version that this lock had when it was accepted.
    """

    lock: Lock = field(default_factory=lambda: Lock({}))
    repos: tuple[str, ...] = ()
    hub: bool = False
    folders: tuple[Path, ...] = ()
    endpoint: str = HUB
    require_signatures: bool = False
    trusted_root: Path | None = None
    minimum_versions: Mapping[str, int] = field(default_factory=dict)
    signers: tuple[Signer, ...] = ()
    recorded: Mapping[str, int] = field(default_factory=dict)
    path: Path | None = None
    denied: str | None = None

    @classmethod
    def find(cls, lock: str | None = None, policy: str | None = None) -> Policy:
        """The named files, else those of the working folder, else those of the user's config folder; none refuses everything.

        Those of the working folder count as they were when they were accepted here; see record.

        Raises:
            TrustError: a named file is missing, or one cannot be understood.
        """
        (lock_path, lock_data, why_lock), (path, data, why) = _read(LOCK, lock), _read(POLICY, policy)
        if data is None or path is None or why:
            nothing = f"there is no {POLICY}, and without one no code from elsewhere is run; `slipstream kernels lock` writes one"
            return cls(denied=why or nothing)
        allowed = cls.parse(data, path)
        if lock_data is None or lock_path is None or why_lock:
            return allowed.with_lock(Lock({}), {}, why_lock)
        return allowed.with_lock(Lock.parse(lock_data, lock_path), record.versions(lock_path))

    @classmethod
    def parse(cls, data: bytes, path: Path) -> Policy:
        """A policy without a lock.

        Raises:
            TrustError: it is not TOML, or has an entry that is not known: a rule that is misspelt must not be skipped.
        """
        try:
            value = tomllib.loads(data.decode())
            if unknown := value.keys() - _KEYS:
                raise ValueError(f"{sorted(unknown)} is not known; known are {', '.join(sorted(_KEYS))}")
            sources = _texts(value, "sources", ["hub"])
            folders = [path.parent / Path(s).expanduser() for s in sources if s != "hub"]
            repos = _texts(value, "repos", [])
            minimum = value.get("minimum_versions", {})
            for pattern in repos:
                _check_pattern(pattern)
            for repo, version in minimum.items():
                if not is_repo(repo) or not isinstance(version, int) or isinstance(version, bool):
                    raise ValueError(f"minimum_versions: not org/repo = number: {repo} = {version!r}")
            root = value.get("trusted_root")
            return cls(
                repos=tuple(repos),
                hub="hub" in sources,
                folders=tuple(f.resolve() for f in folders),
                endpoint=_of(value, "endpoint", HUB, str).rstrip("/"),
                require_signatures=_of(value, "require_signatures", False, bool),
                trusted_root=None if root is None else path.parent / Path(root).expanduser(),
                minimum_versions=minimum,
                signers=tuple(_signer(s) for s in value.get("signers", [])),
                path=path,
            )
        except (ValueError, TypeError, AttributeError) as e:
            raise TrustError(f"{path}: {e}") from e

    def with_lock(self, lock: Lock, recorded: Mapping[str, int], denied: str | None = None) -> Policy:
        return replace(self, lock=lock, recorded=recorded, denied=denied)

    def allows(self, repo: str) -> str | None:
        """Why code from `repo` (org/repo or an absolute path) may not run here, pinned or not."""
        if self.denied:
            return self.denied
        if not is_repo(repo):
            if any(Path(repo).is_relative_to(folder) for folder in self.folders):
                return None
            return f"it lies in none of the folders that {self.path} lists as sources"
        if not any(matches(pattern, repo) for pattern in self.repos):
            return f"{self.path} does not list it: repos = {list(self.repos)}"
        return None if self.hub else f'"hub" is not among the sources of {self.path}'

    def why_not(self, name: str) -> str | None:
        """Why `name` may not be loaded, from the two files alone: for choose(). Whether the bytes are right is seen on opening."""
        return self._why_not(self.repo_of(name), set())

    def _why_not(self, repo: str, seen: set[str]) -> str | None:
        if why := self.allows(repo):
            return why
        pin = self.lock.pins.get(repo)
        if pin is None:
            return f"it is not in {self.lock.path or LOCK}"
        lowest = self.minimum_versions.get(repo)
        if lowest is not None and (pin.version is None or pin.version < lowest):
            return f"the lock has version {pin.version}, and {self.path} asks for {lowest} at least"
        before = self.recorded.get(repo)
        if before is not None and (pin.version is None or pin.version < before):
            return f"the lock was rolled back: it has version {pin.version}, and had {before} when it was accepted"
        for needed in pin.depends:
            if needed in seen | {repo}:
                return f"it and {needed} need each other"
            if why := self._why_not(needed, seen | {repo}):
                return f"it needs {needed}: {why}"
        return None

    def pinned(self, name: str) -> Pin:
        """The entry of the lock for `name`.

        Raises:
            TrustError: it is not allowed or not pinned.
        """
        if why := self.why_not(name):
            raise refusal(self.repo_of(name), why)
        return self.lock.pins[self.repo_of(name)]

    def repo_of(self, name: str) -> str:
        """`org/repo` of org/repo:Layer; of a path the absolute one, with every link on the way resolved."""
        repo = split_layer(name)[0]
        return repo if is_repo(repo) else str(Path(repo).expanduser().resolve())


def split_layer(name: str) -> tuple[str, str | None]:
    repo, colon, layer = name.rpartition(":")
    return (repo, layer) if colon and layer.isidentifier() else (name, None)


def refusal(repo: str, why: str) -> TrustError:
    """The error that everything ends in which is not run."""
    return TrustError(f"{repo}: {why}. None of it was run; to review and pin it: slipstream kernels lock {repo}")


def _read(name: str, named: str | None) -> tuple[Path | None, bytes | None, str | None]:
    """Path and content of a file, or why it does not count."""
    here, users = Path.cwd() / name, config_root() / name
    path = Path(named).expanduser() if named else here if here.exists() else users if users.exists() else None
    if path is None:
        return None, None, None
    try:
        data = path.read_bytes()
    except OSError as e:
        raise TrustError(f"{path} cannot be read: {e.strerror}; make it with: slipstream kernels lock org/repo") from e
    if not named and path == here and not record.is_accepted(path, data):
        return path, None, (
            f"{path} was not accepted on this machine as it is now; review it and accept it with `slipstream kernels lock`, or "
            f"name it"
        )  # fmt: skip
    return path.absolute(), data, None


def _of(value: dict[str, Any], name: str, default: Any, kind: type) -> Any:
    found = value.get(name, default)
    if not isinstance(found, kind):
        raise ValueError(f"{name}: must be {'text' if kind is str else 'true or false'}, got {found!r}")
    return found


def _texts(value: dict[str, Any], name: str, default: list[str]) -> list[str]:
    found = value.get(name, default)
    if not isinstance(found, list) or not all(isinstance(t, str) for t in found):
        raise ValueError(f"{name}: must be a list of texts, got {found!r}")
    return found


def _check_pattern(pattern: str) -> None:
    if pattern.count("/") != 1:
        raise ValueError(f"repos: {pattern!r} is not org/name, where a star may stand in each: kernels-community/*")


def _signer(value: dict[str, Any]) -> Signer:
    known = {"identity", "issuer", "repository", "repos"}
    if unknown := value.keys() - known:
        raise ValueError(f"signers: {sorted(unknown)} is not known; known are {', '.join(sorted(known))}")
    for name in ("identity", "issuer"):
        if not isinstance(value.get(name), str):
            raise ValueError(f"signers: each needs {name}, as text")
    repos = _texts(value, "repos", list(ANY))
    for pattern in repos:
        if not pattern.startswith("/"):
            _check_pattern(pattern)
    repository = value.get("repository")
    if repository is not None and not isinstance(repository, str):
        raise ValueError(f"signers: repository must be text, got {repository!r}")
    return Signer(value["identity"], value["issuer"], repository, tuple(repos))
