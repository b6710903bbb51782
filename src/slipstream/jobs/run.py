"""Answer a file of requests: a few of them in the engine at a time, every answer kept as it comes, all in order at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import filecmp
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipstream.checkpoint.save import sync_folder
from slipstream.errors import ConfigError
from slipstream.jobs.answers import answer, failure
from slipstream.jobs.journal import NAME, Journal
from slipstream.jobs.lines import Input, Line, parse_line, raw_lines, read_input, read_task
from slipstream.pump import Pump, Ride
from slipstream.quantization.folder import check_parent, disk_errors, hidden_beside, workplace
from slipstream.request import Request, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from slipstream.checkpoint.tensors import TensorInfo
    from slipstream.conversation import Parser
    from slipstream.llm import LLM

Progress = Callable[[int, int, int], None]
VERSION = 1
_FAILURES = 16  # passes in a row that raise before it is the machine's fault, not a line's
_PROBE = 64  # bytes of each tensor that tell one model from another
_ENGINE = "dtype", "quantization", "max_model_len", "seed", "batch_invariant", "scheduling_policy"
_ONLY_WHEN = "priority", "cache_salt"  # decide when a line is answered, and not how


@dataclass(frozen=True, slots=True)
class JobReport:
    """What became of a job. `resumed` lines were there from an earlier run; `seconds` and `tokens_per_second` are of this
    one, all else is of the whole file."""

    path: Path
    lines: int
    answered: int
    errors: int
    resumed: int
    prompt_tokens: int
    new_tokens: int
    seconds: float
    tokens_per_second: float


def run_batch(
    llm: LLM,
    in_path: str | Path | Input,
    out_path: str | Path,
    *,
    params: SamplingParams | Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> JobReport:
    """Answer every line of `in_path`, and write the answers to `out_path` in the same order.

    What is answered is kept in a journal in the hidden folder `.OUT.partial` beside the output. A run that was killed goes
    on from there when it is called again with the same input and settings. `out_path` appears whole, at the end.

    A few lines are queued at a time, in the order of the file. A line's `deadline` counts from when it is queued, so not while
    the job is at other lines, and anew when it is tried again; its answer then says abort and deadline, and is not asked for
    again. `priority` decides among the lines that are queued.

    Args:
        in_path: one JSON object a line: OpenAI's batch format, or `prompt` or `messages` with any field of SamplingParams.
        params: for what a line does not say: SamplingParams, or a dict of changes to the model's own defaults. With None
            or a dict, a chat without max_new_tokens goes on until the model ends its turn.
        overwrite: replace `out_path`, and begin anew where an unfinished job had another input or other settings.
        progress: called with (lines done, lines in all, new tokens so far).

    Raises:
        RequestError: the input cannot be read, or two lines have the same id. What is wrong with a line is its answer.
        ConfigError: `out_path` exists, or there is an unfinished job with another input or other settings.
        CapacityError: the disk is full. Call it again when there is room.
    """
    began = time.perf_counter()
    given = in_path if isinstance(in_path, Input) else read_input(in_path)
    out = check_out(given.path, out_path, overwrite=overwrite)
    bases = _bases(llm, params)
    llm.engine.scheduler.check_priority(bases[0])  # else every line would be refused
    asked = {"version": VERSION, "input": given.sha256, "settings": _settings(llm, given, bases)}
    with contextlib.ExitStack() as stack:
        with disk_errors(out):
            hidden = stack.enter_context(workplace(out))
            journal = stack.enter_context(Journal(hidden, out, asked, given.lines, overwrite=overwrite))
        if os.path.lexists(out) and not overwrite and journal.done < given.lines:
            raise ConfigError(_exists(out))
        before = journal.new_tokens
        if journal.done < given.lines:
            _Run(llm, given, journal, bases, progress).go()
        _publish(journal, hidden, out, overwrite=overwrite)
        seconds = time.perf_counter() - began
        new = journal.new_tokens
        return JobReport(
            out, given.lines, given.lines - journal.errors, journal.errors, journal.resumed, journal.prompt_tokens, new,
            seconds, (new - before) / seconds,
        )  # fmt: skip


def check_out(in_path: Path, out_path: str | Path, *, overwrite: bool) -> Path:
    """The absolute path of the output.

    Raises:
        ConfigError: it is the input, exists, or cannot be made.
    """
    out = Path(out_path).absolute()
    out = out.parent.resolve() / out.name
    check_parent(out)
    if out.exists() and in_path.exists() and os.path.samefile(out, in_path):
        raise ConfigError(f"out: {out} is the input; name another file")
    if out.is_symlink() or (out.exists() and not out.is_file()):
        raise ConfigError(f"out: {out} is not a plain file; name another one")
    if out.exists() and not overwrite and not (hidden_beside(out) / NAME).exists():
        raise ConfigError(_exists(out))
    return out


def _exists(out: Path) -> str:
    return f"out: {out} exists; name another file, or allow it to be replaced (overwrite=True, --overwrite)"


def _bases(llm: LLM, params: SamplingParams | Mapping[str, Any] | None) -> tuple[SamplingParams, SamplingParams]:
    """What holds where a line says nothing, for a text and for a chat."""
    if isinstance(params, SamplingParams):
        return params, params
    changes = dict(params or {})
    text = llm.default_params.replace(**changes)
    return text, text if "max_new_tokens" in changes else text.replace(max_new_tokens=None)


def _settings(llm: LLM, given: Input, bases: tuple[SamplingParams, SamplingParams]) -> dict[str, Any]:
    """All that answers depend on beside the input. How fast they come (device, memory, max_num_seqs) is not part of it."""
    digest = hashlib.sha256(repr(llm.model_config).encode())
    digest.update(repr(llm.tokenizer.chat_template).encode())
    for load in llm.plan.loads:
        for source in load.sources:
            for part in source.parts or (source,):
                digest.update(_probe(part))
    engine = {n: getattr(llm.plan.asked, n) for n in _ENGINE}
    return {"model": digest.hexdigest()[:16], **engine} | {
        f"{name}{end}": value
        for base, end in zip(bases, ("", " in chats"), strict=True)
        for name, value in dataclasses.asdict(base).items()
        if name not in _ONLY_WHEN
    }


def _probe(tensor: TensorInfo) -> bytes:
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset)
            return f"{tensor.name}{tensor.dtype}{tensor.shape}".encode() + file.read(min(_PROBE, tensor.nbytes))
    except OSError as e:
        raise ConfigError(f"{tensor.file}: the model's file cannot be read any more: {e.strerror or e}") from e


def _publish(journal: Journal, hidden: Path, out: Path, *, overwrite: bool) -> None:
    """Write the answers in order and give them their name. Can be cut off anywhere and done again."""
    new = hidden / "answers"
    with disk_errors(out):
        journal.sync()
        with new.open("wb") as file:
            for line in journal.answers():
                file.write(line)
            file.flush()
            os.fsync(file.fileno())
        # It may be there because a run was killed after the next line. Anything else is not ours to replace.
        if os.path.lexists(out) and not overwrite and not filecmp.cmp(new, out, shallow=False):
            new.unlink()
            raise ConfigError(f"{_exists(out)}; all lines are answered, and the same command then writes them at once")
        new.replace(out)
        sync_folder(out.parent)
        journal.remove()


Item = tuple[int, Line]  # a line, and which one it is of those that are not blank


class _Run:
    """The lines on their way through the engine."""

    def __init__(
        self,
        llm: LLM,
        given: Input,
        journal: Journal,
        bases: tuple[SamplingParams, SamplingParams],
        progress: Progress | None,
    ) -> None:
        self.llm, self.given, self.journal, self.bases = llm, given, journal, bases
        self.progress = progress or (lambda done, total, tokens: None)
        self.pump = Pump(llm.engine, self._make, _FAILURES)
        self.again: deque[Item] = deque()  # were in a pass that raised; whose fault it was shows at the end, alone

    def go(self) -> None:
        """Answer what the journal has not. Whatever stops it, the journal holds every answer that was finished."""
        with contextlib.closing(self._left()) as left:
            self._answer(left)
        while self.again:
            self._answer(iter([self.again.popleft()]), alone=True)

    def _answer(self, items: Iterator[Item], *, alone: bool = False) -> None:
        with contextlib.closing(self.pump.run(items)) as passes:
            for ended in passes:
                for ride in ended:
                    if ride.broken and not alone:
                        self.again.append(ride.item)
                    else:
                        self._keep(ride)
                self._show()

    def _left(self) -> Generator[Item, None, None]:
        digest = hashlib.sha256()
        index = -1
        for index, (number, raw) in enumerate(raw_lines(self.given.path, digest)):
            if index >= self.given.lines:
                break
            if index not in self.journal:
                yield index, parse_line(number, raw, self.given.kind)
        if index + 1 != self.given.lines or digest.hexdigest() != self.given.sha256:
            raise ConfigError(
                f"in: {self.given.path} was changed while the job ran, so the answers cannot be told apart; begin anew "
                "with --overwrite"
            )

    def _make(self, item: Item) -> tuple[Request, list[Parser] | None]:
        task = read_task(item[1], None if self.given.any_model else self.given.model)
        params = self.bases[task.messages is not None].replace(**task.changes)
        if task.messages is None:
            return self.llm.make_request(task.prompt, params), None
        return self.llm.make_chat_request(task.messages, params, **task.options)

    def _keep(self, ride: Ride[Item]) -> None:
        index, line = ride.item
        if ride.refused is not None:
            self.journal.add(index, failure(line, ride.refused), good=False, prompt_tokens=0, new_tokens=0)
            return
        output = ride.output
        new = sum(len(c.token_ids) for c in output.outputs)
        error = _error(output)
        value = failure(line, error) if error else answer(line, output, self.given.model, self.llm.tokenizer)
        prompt = len(output.prompt_token_ids)
        self.journal.add(index, value, good=error is None, prompt_tokens=prompt, new_tokens=new)

    def _show(self) -> None:
        writing = sum(len(c.token_ids) for stream in self.pump.live for c in stream.output.outputs)
        self.progress(self.journal.done, self.given.lines, self.journal.new_tokens + writing)


def _error(output: RequestOutput) -> str | None:
    """Why an answer has failed, if one has."""
    return next((c.error or "failed" for c in output.outputs if c.finish_reason == "error"), None)
