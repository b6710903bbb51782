"""Models of the Hugging Face Hub: only weights and text are fetched, never code or pickle, and every hash is checked.

The files stay in the Hub's own cache, shared with other programs. What was verified is recorded beside our own models,
one small JSON for each (model, revision, file) asked for; a model with a record opens without asking the network.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from slipstream.config.paths import cache_root
from slipstream.errors import CheckpointError
from slipstream.sources.files import Progress, read_chunks, sha256_of, write_whole

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[^:@\s]+))?(:(?P<file>[^:@\s]+\.gguf))?", re.ASCII)
_TEXT = re.compile(r".+\.(json|jinja)|(merges|vocab)\.txt|tokenizer\.model")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class HubModel:
    """`org/name`, `org/name@revision`, or one GGUF of it: `org/name:file.gguf`."""

    repo: str
    revision: str = "main"
    file: str | None = None

    @classmethod
    def parse(cls, name: str) -> HubModel | None:
        match = _NAME.fullmatch(name)
        if match is None or ".." in name:
            return None
        return cls(match["repo"], match["revision"] or "main", match["file"])

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return self.repo + revision + (f":{self.file}" if self.file else "")


@dataclass(frozen=True, slots=True)
class Record:
    """What was pulled and verified. `files`: name -> (bytes, SHA-256)."""

    commit: str
    folder: str
    files: dict[str, tuple[int, str]]

    def path(self, model: HubModel) -> Path:
        return Path(self.folder, model.file) if model.file else Path(self.folder)

    @property
    def hashes(self) -> dict[str, str]:
        return {name: digest for name, (_, digest) in self.files.items()}

    def is_whole(self) -> bool:
        """Whether every file is still there with its size."""
        try:
            return all(Path(self.folder, name).stat().st_size == size for name, (size, _) in self.files.items())
        except OSError:
            return False


def recorded(model: HubModel) -> Record | None:
    """The record of a model that was pulled before and is still whole."""
    try:
        data = json.loads(_record_path(model).read_text())
        record = Record(data["commit"], data["folder"], {k: (int(v[0]), str(v[1])) for k, v in data["files"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # none, or not ours: pulling writes a new one
    return record if record.files and record.is_whole() else None


def all_recorded() -> list[tuple[HubModel, Record]]:
    """The models that were pulled before and are still whole, by name."""
    found = []
    for path in sorted((cache_root() / "hub").glob("*/*.json")):
        revision, _, file = unquote(path.stem).partition(":")
        model = HubModel.parse(path.parent.name.replace("--", "/", 1))
        if model is not None:
            model = HubModel(model.repo, revision, file or None)
            if record := recorded(model):
                found.append((model, record))
    return found


def _record_path(model: HubModel) -> Path:
    asked = model.revision + (f":{model.file}" if model.file else "")
    return cache_root() / "hub" / model.repo.replace("/", "--") / (quote(asked, safe="") + ".json")


def is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def recheck(record: Record, progress: Progress) -> None:
    """Hash the files again; remove those that are not what they were, in the Hub's cache too."""
    for name, (_, digest) in record.files.items():
        path = Path(record.folder, name)
        if sha256_of(path, progress) != digest:
            _remove(path)


def _remove(path: Path) -> None:
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def fetch(model: HubModel, progress: Progress, *, force: bool = False) -> tuple[Record, bool]:
    """Download what is missing, verify it all, and record it. Returns the record and whether anything was new."""
    from huggingface_hub import HfApi, snapshot_download

    with _hub_errors(model):
        info = HfApi().model_info(model.repo, revision=model.revision, files_metadata=True)
        siblings = {s.rfilename: s for s in info.siblings or []}
        before = recorded(model)
        if before and before.commit == info.sha and not force:
            return before, False
        names = _wanted(model, info, siblings)
        folder = Path(
            snapshot_download(
                model.repo,
                revision=info.sha,
                allow_patterns=[glob.escape(name) for name in names],
                force_download=force,
                tqdm_class=_bar(f"downloading {model}", sum(siblings[n].size or 0 for n in names), progress),
            )
        )
    files = {name: _verified(model, folder / name, siblings[name], progress) for name in names}
    record = Record(info.sha or "", str(folder), files)
    path = _record_path(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, [json.dumps(asdict(record), indent=1).encode()])
    return record, True


def fetch_text(model: HubModel, progress: Progress) -> Path:
    """config.json, tokenizer and the like, verified, but no weights; so there is no record of it."""
    from huggingface_hub import HfApi, snapshot_download

    with _hub_errors(model):
        info = HfApi().model_info(model.repo, revision=model.revision, files_metadata=True)
        siblings = {s.rfilename: s for s in info.siblings or []}
        names = _text(siblings)
        patterns = [glob.escape(name) for name in names]
        bar = _bar(f"downloading {model}", sum(siblings[n].size or 0 for n in names), progress)
        folder = Path(snapshot_download(model.repo, revision=info.sha, allow_patterns=patterns, tqdm_class=bar))
    for name in names:
        _verified(model, folder / name, siblings[name], progress)
    return folder


def from_hub_cache(model: HubModel) -> Path:
    """Offline and not recorded: what another program may have left in the Hub's cache, unverified."""
    from huggingface_hub import snapshot_download

    with _hub_errors(model):
        folder = Path(
            snapshot_download(
                model.repo, revision=model.revision, local_files_only=True, allow_patterns=["config.json"]
            )
        )
    path = folder / model.file if model.file else folder
    if not path.exists():
        raise CheckpointError(f"{model} is not in the Hub's cache at {folder}, and HF_HUB_OFFLINE forbids fetching it.")
    return path


def _wanted(model: HubModel, info: ModelInfo, siblings: dict[str, RepoSibling]) -> list[str]:
    """The files of the main folder that are weights or text. Folders hold other formats, or the same weights again."""
    from huggingface_hub import hf_hub_download

    if unsafe := [name for name in siblings if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]:
        raise CheckpointError(f"{model}: refused, as it lists files outside its own folder, such as {unsafe[0]!r}.")
    ggufs = sorted(name for name in siblings if name.endswith(".gguf"))
    if model.file:
        if model.file not in siblings:
            have = f"it has {', '.join(ggufs)}" if ggufs else "it has no GGUF file"
            raise CheckpointError(f"{model.repo} has no file {model.file}; {have}.")
        return [model.file]
    text = _text(siblings)
    if _INDEX in siblings:
        index = Path(hf_hub_download(model.repo, _INDEX, revision=info.sha))
        try:
            weights = {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{model}: its {_INDEX} is not an index of weights ({error!r}).") from error
        if missing := sorted(weights - siblings.keys()):
            raise CheckpointError(
                f"{model}: its {_INDEX} names {len(missing)} files that are not there, such as {missing[0]!r}."
            )
        weights = {name for name in weights if name.endswith(".safetensors")} | {_INDEX}
    elif "model.safetensors" in siblings:
        weights = {"model.safetensors"}
    else:
        weights = {name for name in siblings if "/" not in name and name.endswith(".safetensors")}
    if weights:
        return sorted([*text, *weights])
    if ggufs:
        raise CheckpointError(
            f"{model} holds GGUF files and no safetensors. Name one of them: "
            + ", ".join(f"{model}:{name}" for name in ggufs)
        )
    pickles = [name for name in siblings if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    but = f", only pickled weights ({pickles[0]}), which can run code and are never loaded" if pickles else ""
    raise CheckpointError(f"{model} holds neither safetensors nor GGUF files{but}. Look for a converted copy of it.")


def _text(siblings: Iterable[str]) -> list[str]:
    return [name for name in siblings if "/" not in name and _TEXT.fullmatch(name) and name != _INDEX]


def _verified(model: HubModel, path: Path, sibling: RepoSibling, progress: Progress) -> tuple[int, str]:
    """Size and SHA-256 of a file that is what the Hub says: SHA-256 for large files, git's blob hash for small ones."""
    size = path.stat().st_size
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    for chunk in read_chunks(path, f"verifying {path.name}", progress):
        sha256.update(chunk)
        if sibling.lfs is None:
            blob.update(chunk)
    expected, found = (sibling.lfs.sha256, sha256.hexdigest()) if sibling.lfs else (sibling.blob_id, blob.hexdigest())
    if found != expected:
        _remove(path)
        raise CheckpointError(
            f"{model}: {path.name} came damaged: its hash is {found}, the Hub says {expected}. "
            "It was removed; pull again."
        )
    return size, sha256.hexdigest()


def _bar(label: str, total: int, progress: Progress) -> Any:
    """A progress bar class that draws nothing and calls `progress`. The Hub's client has several in bytes."""
    from tqdm.auto import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self.counts_bytes:
                progress(label, min(int(self.n), total), total)

    return Bar


@contextlib.contextmanager
def _hub_errors(model: HubModel) -> Iterator[None]:
    """The Hub client's errors, as one of ours that says what to try."""
    import httpx
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{model.repo}"
    try:
        yield
    except CheckpointError:
        raise
    except errors.GatedRepoError as error:
        why = f"is gated. Ask for access at {page}, then run `hf auth login` or set HF_TOKEN"
        raise CheckpointError(f"{model} {why}.") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{model.repo} has no revision {model.revision!r}. See {page}/tree/main.") from error
    except errors.RepositoryNotFoundError as error:
        why = "is neither a folder here nor a model that the Hub shows you. Check the spelling; if it is private"
        raise CheckpointError(f"{model} {why}, run `hf auth login` or set HF_TOKEN.") from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{model} is not a valid Hub name: {error}") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        if constants.HF_HUB_OFFLINE:
            why = "was not pulled before, and HF_HUB_OFFLINE forbids asking the Hub. Unset it, or give a folder or file"
        else:
            why = f"could not be fetched: {_short(error)}. What was complete is kept; pull again"
        raise CheckpointError(f"{model} {why}.") from error
    except (OSError, httpx.HTTPError) as error:
        # Without a number it is the client's word for a short answer; with one, and not of a connection, the disk's.
        of_network = isinstance(error, (httpx.HTTPError, ConnectionError, TimeoutError))
        if isinstance(error, OSError) and error.errno is not None and not of_network:
            raise
        raise CheckpointError(
            f"{model}: no answer from {constants.ENDPOINT}: {_short(error)}. What was complete is kept. "
            "Pull again, check the network and HTTPS_PROXY, name a mirror with HF_ENDPOINT, or give a folder or file."
        ) from error


def _short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
