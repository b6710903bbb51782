"""`quantize`: a checkpoint in, a folder with smaller weights out, one tensor at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from slipstream.checkpoint.manifest import NAME, VERSION, verify
from slipstream.checkpoint.open import Checkpoint, open_checkpoint
from slipstream.checkpoint.save import Entry, file_bytes, shard_names, write_index, write_json, write_shard
from slipstream.checkpoint.support import refuse_quantized
from slipstream.config import ModelConfig
from slipstream.errors import CapacityError, ConfigError, SlipstreamError
from slipstream.quantization.describe import beside, config_of, write_beside
from slipstream.quantization.folder import (
    Journal,
    check_exchange,
    check_space,
    check_target,
    disk_errors,
    publish,
    workplace,
)
from slipstream.quantization.pieces import Errors
from slipstream.quantization.select import Selection
from slipstream.quantization.work import Job, Work
from slipstream.sources import resolve

LAYOUT = 2  # of what is written; raised with every change, so that no run goes on with the shards of another
Progress = Callable[[str, int, int | None], None]  # what is done, bytes of the source, bytes in all


@dataclass(frozen=True)
class Report:
    """What was done.

    Attributes:
        group_size: of int4, else None.
        bytes_before, bytes_after: of all weights.
        parameters, parameters_covered: weights of the model, and those of them that are packed now.
        errors: module -> ||decoded - w|| / ||w||, the worst first; those that arrived packed are not there.
        resumed: shards that an earlier run had finished.
        notes: what else one should know.
    """

    path: Path
    to: str
    group_size: int | None
    bytes_before: int
    bytes_after: int
    parameters: int
    parameters_covered: int
    errors: Mapping[str, float]
    shards: int
    resumed: int
    notes: tuple[str, ...]


def quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str = "mxfp4",
    modules: Sequence[str] = (),
    skip: Sequence[str] = (),
    group_size: int | None = None,
    max_shard_bytes: int = 2 << 30,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write a copy of a model with its linear layers in a smaller format.

    `out` appears whole or not at all. A run that was interrupted leaves what it finished in a hidden folder beside `out`,
    and the same call goes on from there; the result is the same to the byte.

    Args:
        model: as LLM takes it.
        out: a folder that does not exist yet.
        to: mxfp4, int8 or int4.
        modules: shell-style patterns of the modules to convert, such as "*.mlp.*"; () is every linear layer and expert of
            the decoder, for gpt-oss to mxfp4 the experts alone. Weights that are packed already stay so unless named.
        skip: patterns of modules to leave as they are.
        group_size: weights that share a scale in int4: 128, 64 or 32; None is the largest that fits.
        max_shard_bytes: where a new file is begun.
        overwrite: replace `out` in one move, if it is a model.
        progress: called as progress(label, bytes done, bytes in all).

    Raises:
        ConfigError: an option is wrong, matches nothing, or does not fit the shapes.
        CheckpointError: the model cannot be read, or holds NaN or infinity in what is to be converted.
        CapacityError: the disk has no room.
    """
    for name, path in (("model", model), ("out", out)):
        if not isinstance(path, (str, os.PathLike)):
            raise ConfigError(f"{name}: must be a name or a path, got {type(path).__name__}")
    if not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes: must be a whole number of at least 1, got {max_shard_bytes!r}")
    Selection(to, "", modules, skip, group_size)  # before anything is fetched
    checkpoint = open_checkpoint(resolve(model, progress=progress))
    config = ModelConfig.from_hf(checkpoint.config)
    refuse_quantized(checkpoint, config.quantization)
    selection = Selection(to, config.model_type, modules, skip, group_size)
    group = selection.check({n: i.shape for n, i in checkpoint.tensors.items()})
    target = Path(out).expanduser().absolute()
    target = target.parent.resolve() / target.name
    with disk_errors(target):
        check_target(target, checkpoint.path, overwrite=overwrite)
        if checkpoint.kind == "safetensors":
            verify(checkpoint.path)  # damage must not get a hash of its own
        return _Run(checkpoint, selection, group, target, max_shard_bytes, _name(model), progress or _silent).run()


def _silent(label: str, done: int, total: int | None) -> None:
    """The Progress that shows nothing."""


def _name(model: str | os.PathLike[str]) -> str:
    path = Path(os.path.expanduser(model))
    return path.resolve().name if path.exists() else os.fspath(model)


class _Run:
    def __init__(self, checkpoint: Checkpoint, selection: Selection, group: int, out: Path, max_shard_bytes: int,
                 name: str, progress: Progress) -> None:  # fmt: skip
        import torch

        dtypes = {i.dtype for i in checkpoint.tensors.values()}
        self.dtype = torch.float32 if dtypes == {"F32"} else torch.bfloat16  # of what GGUF holds and stays unpacked
        self.work = Work(checkpoint, selection, group, self.dtype)
        self.published = self.work.published()
        self.checkpoint, self.selection, self.out, self.progress = checkpoint, selection, out, progress
        self.group = group if selection.format == "int4" else 0
        jobs = self.work.jobs()
        if checkpoint.kind == "safetensors" and not any(job.converted for job in jobs):
            raise ConfigError(
                f"to: nothing is left to convert: what was selected is {selection.format} or packed already"
            )
        divided = list(_divide(jobs, max_shard_bytes))
        self.shards = dict(zip(shard_names(len(divided)), divided, strict=True))
        self.packed = {m: kind for job in jobs for m, kind in job.packed.items()}
        self.settings = {
            "source": name, "to": selection.format, "modules": list(selection.modules), "skip": list(selection.skip),
            "group_size": group or None, "max_shard_bytes": max_shard_bytes,
        }  # fmt: skip

    def run(self) -> Report:
        with workplace(self.out) as hidden:
            check_exchange(hidden, self.out)
            journal = Journal(hidden, {"layout": LAYOUT, "settings": self.settings, "files": self._identity()})
            try:
                resumed = len(journal.finished)
                write_beside(self.checkpoint, hidden)
                self._write_shards(hidden, journal)
                errors = self._errors(journal)
                self._describe(hidden, journal, errors)
            except BaseException as e:
                journal.close()
                passing = isinstance(e, CapacityError) or isinstance(e.__cause__, OSError)  # a full disk, a lost one
                if isinstance(e, SlipstreamError) and not (passing and journal.finished):
                    shutil.rmtree(hidden)  # the same call would end the same way
                raise
            journal.close(remove=True)
            publish(hidden, self.out)
        return self._report(errors, resumed, journal.restarted)

    def _identity(self) -> dict[str, list[int]]:
        """What tells the source from another: sizes and times of its files."""
        files = {i.file for i in self.checkpoint.tensors.values()} | set(beside(self.checkpoint))
        files |= {self.checkpoint.path / "config.json"} if self.checkpoint.kind == "safetensors" else set()
        stats = {str(path): path.stat() for path in sorted(files)}
        return {path: [s.st_size, s.st_mtime_ns] for path, s in stats.items()}

    def _write_shards(self, hidden: Path, journal: Journal) -> None:
        sizes = {name: file_bytes(_entries(jobs)) for name, jobs in self.shards.items()}
        check_space(hidden, sum(size for name, size in sizes.items() if name not in journal.finished))
        total = sum(job.read for jobs in self.shards.values() for job in jobs)
        label, done = f"writing {self.out.name}", 0

        def pieces(jobs: list[Job], errors: Errors) -> Iterator[tuple[str, Any]]:
            nonlocal done
            for job in jobs:
                yield from job.pieces(errors)
                done += job.read
                self.progress(label, done, total)

        for name, jobs in self.shards.items():
            if name in journal.finished:
                done += sum(job.read for job in jobs)
                continue
            errors = Errors()
            digest = write_shard(hidden / name, _entries(jobs), pieces(jobs, errors))
            journal.finish(name, bytes=sizes[name], sha256=digest, errors=errors.sums)

    def _errors(self, journal: Journal) -> dict[str, float]:
        """Of each module, the worst first."""
        errors = Errors()
        for name in self.shards:
            errors.merge(journal.finished[name]["errors"])
        return dict(sorted(errors.relative().items(), key=lambda item: (-item[1], item[0])))

    def _describe(self, hidden: Path, journal: Journal, errors: Mapping[str, float]) -> None:
        write_index(hidden, {name: _entries(jobs) for name, jobs in self.shards.items()})
        shards = {name: {k: journal.finished[name][k] for k in ("bytes", "sha256")} for name in self.shards}
        write_json(hidden / NAME, {"version": VERSION, **self.settings, "shards": shards, "errors": errors})
        dtype = str(self.dtype).removeprefix("torch.")
        config = config_of(self.checkpoint, self.selection.model_type, dtype, self.packed, self.published)
        write_json(hidden / "config.json", config)  # last, as no folder opens without it

    def _report(self, errors: Mapping[str, float], resumed: int, restarted: bool) -> Report:
        jobs = [job for jobs in self.shards.values() for job in jobs]
        notes = []
        if restarted:
            notes.append("an unfinished run of other settings or another source was found, so this one started anew")
        if self.selection.model_type == "gpt_oss" and not self.published:
            notes.append("experts of gpt-oss in this form are read by slipstream only; others read them in mxfp4 alone")
        widened = [i for i in self.checkpoint.tensors.values() if i.is_quantized and not self.work.packs(i)]
        if widened:  # GGUF's blocks have no place in safetensors
            name = str(self.dtype).removeprefix("torch.")
            some = f"{widened[0].name}{', ...' if len(widened) > 1 else ''}"
            what = "a tensor" if len(widened) == 1 else f"{len(widened)} tensors"
            notes.append(f"{what} in GGUF's blocks, not to be converted, became {name}: {some}")
        after = sum(e.nbytes for job in jobs for e in job.entries)
        if after > self.checkpoint.total_bytes:
            notes.append(
                "the new folder is larger than its source, which is quantized itself; start from floats where you can"
            )
        parameters = sum(prod(i.shape) for i in self.checkpoint.tensors.values())
        return Report(
            path=self.out,
            to=self.selection.format,
            group_size=self.group or None,
            bytes_before=self.checkpoint.total_bytes,
            bytes_after=after,
            parameters=parameters,
            parameters_covered=sum(job.covered for job in jobs),
            errors=errors,
            shards=len(self.shards),
            resumed=resumed,
            notes=tuple(notes),
        )


def _entries(jobs: Sequence[Job]) -> list[Entry]:
    return [e for job in jobs for e in job.entries]


def _divide(jobs: Sequence[Job], most: int) -> Iterator[list[Job]]:
    """Jobs in their order, as many to a shard as fit."""
    shard: list[Job] = []
    size = 0
    for job in jobs:
        more = sum(e.nbytes for e in job.entries)
        if shard and size + more > most:
            yield shard
            shard, size = [], 0
        shard.append(job)
        size += more
    if shard:
        yield shard
