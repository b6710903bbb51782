"""Kernel repositories on the Hub or a mirror: what a commit has, and its files, which are trusted only after `tree.verify`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from slipstream.errors import TrustError
from slipstream.trust.lock import Build, File, Pin, bad_name, tree_sha256
from slipstream.trust.signature import BUNDLE, METADATA, identity_of, signed_by

_TIMEOUT = 10.0  # seconds without an answer
_STATUS = "kernel-status.toml"


def pin_from_hub(
    repo: str, endpoint: str, root: Path | None, scratch: Path, *, version: int | None, revision: str | None
) -> Pin:
    """The entry for a lock: the commit of a version (the newest by default) or revision, and every build in it.

    Large files are pinned by the SHA-256 that the Hub states, and compared when they are fetched. Nothing is executed.

    Args:
        root: see signed_by; a signature that is there must be valid, whoever made it.
        scratch: an empty folder for small files.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    _check_online(endpoint, "the Hub must be asked")
    with _hub_errors(endpoint):
        api = HfApi(endpoint=endpoint)
        commit, found = _commit(api, repo, version, revision)
        if any(f.path == _STATUS for f in api.list_repo_tree(repo, repo_type="kernel", revision=commit)):
            raise TrustError(f"it says in {_STATUS} that it has moved; read that, and lock the repository it names")
        tree = api.list_repo_tree(repo, "build", recursive=True, repo_type="kernel", revision=commit)
        entries = [e for e in tree if isinstance(e, RepoFile)]
    trees: dict[str, dict[str, File]] = {}
    texts: dict[str, dict[str, bytes]] = {}
    small: dict[str, str] = {}  # one path for each id in git: builds share most of their Python
    for entry in entries:
        if why := bad_name(entry.path) or (None if entry.path.count("/") > 1 else "it belongs to no build"):
            raise TrustError(f"{entry.path!r}: {why}")
        if entry.lfs is None:
            small.setdefault(entry.blob_id, entry.path)
    fetched = download(repo, commit, list(small.values()), endpoint, scratch) if small else []
    read = {blob: path.read_bytes() for blob, path in zip(small, fetched, strict=True)}
    for entry in entries:
        variant, _, name = entry.path.removeprefix("build/").partition("/")
        if entry.lfs is not None:
            file = File(entry.lfs.size, entry.lfs.sha256)
        else:
            data = read[entry.blob_id]
            file = File(len(data), hashlib.sha256(data).hexdigest())
            texts.setdefault(variant, {})[name] = data
        trees.setdefault(variant, {})[name] = file
    if not trees:
        raise TrustError(f"at {commit[:12]} it has no build/<variant>/, so it is not a kernel repository")
    builds = {v: _build(v, files, texts.get(v, {}), root) for v, files in trees.items()}
    stated, depends = _stated(texts)
    if found is not None and stated is not None and stated != found:
        raise TrustError(f"its branch says version {found}, and its {METADATA} {stated}")
    return Pin(repo, commit, found if stated is None else stated, builds, depends)


def pin_folder(path: Path, root: Path | None, hash_tree: Callable[[Path], dict[str, File]]) -> Pin:
    """The same for a folder on this machine with build/<variant>/, or with the variants themselves."""
    path = path.resolve()
    base = path / "build" if (path / "build").is_dir() else path
    builds, texts = {}, {}
    for folder in sorted(p for p in base.iterdir() if p.is_dir() and (p / METADATA).exists()):
        files = hash_tree(folder)
        texts[folder.name] = {n: (folder / n).read_bytes() for n in (METADATA, BUNDLE) if n in files}
        builds[folder.name] = _build(folder.name, files, texts[folder.name], root)
    if not builds:
        raise TrustError(
            f"it has no build/<variant>/{METADATA}, so it is not a kernel repository; docs/security.md makes a small one"
        )
    version, depends = _stated(texts)
    return Pin(str(path), None, version, builds, depends)


def build_folder(pin: Pin, build: Build) -> Path:
    """Where a local repository has a build."""
    inside = Path(pin.repo) / "build" / build.variant
    return inside if inside.is_dir() else Path(pin.repo) / build.variant


def download(repo: str, commit: str, names: list[str], endpoint: str, folder: Path) -> list[Path]:
    """Fetch files of a commit into `folder`, below their own paths."""
    from huggingface_hub import hf_hub_download

    _check_online(endpoint, f"commit {commit[:12]} is not whole on this machine")
    with _hub_errors(endpoint):
        return [
            Path(
                hf_hub_download(
                    repo, name, repo_type="kernel", revision=commit, endpoint=endpoint, local_dir=folder,
                    etag_timeout=_TIMEOUT,
                )
            )
            for name in names
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Store:
    """Verified builds on this machine, one folder each, named by the SHA-256 of its tree. Only this user can write there."""

    root: Path

    def path(self, build: Build) -> Path:
        return self.root / build.sha256

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with TemporaryDirectory(dir=self.root, prefix=".partial-") as name:
            yield Path(name)

    def keep(self, tree: Path, build: Build) -> None:
        """Move a verified tree in. Another process may have been first; what it put there is verified like ours."""
        try:
            os.rename(tree, self.path(build))
        except OSError:
            if not self.path(build).is_dir():
                raise


def _commit(api: object, repo: str, version: int | None, revision: str | None) -> tuple[str, int | None]:
    from huggingface_hub import HfApi

    assert isinstance(api, HfApi)
    if revision is not None:
        sha = api.kernel_info(repo, revision=revision).sha
        if not sha:
            raise TrustError(f"the Hub names no commit for {revision}")
        return sha, None
    branches = {b.name: b.target_commit for b in api.list_repo_refs(repo, repo_type="kernel").branches}
    versions = {int(n[1:]): c for n, c in branches.items() if n[:1] == "v" and n[1:].isdecimal()}
    if version is None and not versions:
        raise TrustError(f"it has no versions; name a commit: slipstream kernels lock {repo} --revision COMMIT")
    wanted = max(versions) if version is None else version
    if wanted not in versions:
        raise TrustError(f"it has no version {wanted}; there are {', '.join(map(str, sorted(versions))) or 'none'}")
    return versions[wanted], wanted


def _build(variant: str, files: dict[str, File], texts: dict[str, bytes], root: Path | None) -> Build:
    if METADATA not in texts:
        raise TrustError(f"{variant} has no {METADATA}")
    signer: tuple[str, str] | tuple[()] = ()
    if BUNDLE in texts:
        try:
            signer = identity_of(signed_by(texts[METADATA], texts[BUNDLE], files, root))
        except TrustError as e:
            raise TrustError(f"{variant}: {e}") from e
    return Build(variant, tree_sha256(files), files, *signer)


def _stated(texts: dict[str, dict[str, bytes]]) -> tuple[int | None, tuple[str, ...]]:
    """The version and the needed kernels that the builds' metadata state."""
    versions: set[int | None] = set()
    depends: set[str] = set()
    for variant, found in texts.items():
        try:
            metadata = json.loads(found[METADATA])
            versions.add(metadata.get("version"))
            depends |= {d["repo-id"] for d in metadata.get("kernel-depends", [])}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise TrustError(f"{variant}: its {METADATA} cannot be read: {e}") from e
    if len(versions) > 1:
        raise TrustError(f"its builds are of different versions: {sorted(map(str, versions))}")
    return versions.pop(), tuple(sorted(depends))


def _check_online(endpoint: str, what: str) -> None:
    """Ask for one answer first: the Hub's client would try for half a minute.

    Raises:
        TrustError: the network is forbidden or away, or the environment names another Hub than the policy.
    """
    import httpx
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        raise TrustError(f"{what}, and HF_HUB_OFFLINE forbids fetching it")
    named = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    if named and named != endpoint:
        raise TrustError(
            f"{what}, and HF_ENDPOINT names {named} where the policy says {endpoint}; unset it, or write endpoint = {named!r} there"
        )
    try:
        get_session().head(endpoint, timeout=_TIMEOUT)
    except (httpx.HTTPError, httpx.InvalidURL) as e:
        raise TrustError(
            f"{what}, and {endpoint} cannot be reached: {e}; check the network, name a mirror in the policy (endpoint), or "
            "pin a local folder with `slipstream kernels lock FOLDER`"
        ) from e


@contextmanager
def _hub_errors(endpoint: str) -> Iterator[None]:
    import httpx
    from huggingface_hub import errors

    try:
        yield
    except (errors.GatedRepoError, errors.RepositoryNotFoundError) as e:
        raise TrustError(f"{endpoint} has no such kernel repository, or wants a token: hf auth login") from e
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.EntryNotFoundError, httpx.HTTPError) as e:
        raise TrustError(f"it could not be fetched from {endpoint}: {str(e).splitlines()[0][:200]}") from e
    except (errors.HFValidationError, ValueError, OSError) as e:
        raise TrustError(f"what {endpoint} sent could not be read or kept: {e}") from e
