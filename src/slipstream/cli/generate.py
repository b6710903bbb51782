"""`slipstream generate`: one prompt, its answers, and one line on what they cost."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slipstream.cli.options import AnswerOptions, AsJson, EngineOptions, Model, ReasoningEffort, System, flat
from slipstream.cli.show import Table, note, plain, print_json, print_tables, write
from slipstream.cli.stream import is_late, note_late, print_stream
from slipstream.errors import RequestError

if TYPE_CHECKING:
    from slipstream.conversation import ChatStream
    from slipstream.engine.engine import Stream
    from slipstream.llm import LLM
    from slipstream.request import RequestOutput, TokenLogprob


@flat
def generate(
    model: Model,
    sampling: AnswerOptions,
    engine: EngineOptions,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="The text to continue. With -, or left out in a pipe: standard input.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Take the prompt from a file.", show_default=False)
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask the prompt as a question, in the model's chat format.")
    ] = False,
    system: System = None,
    reasoning_effort: ReasoningEffort = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text, or answer a question with --chat.

    The answer goes to standard output as it is written, a line on tokens, time and memory to standard error. One line
    end at the end of a prompt from a file or a pipe is dropped.
    """
    for name, value in (("system", system), ("reasoning_effort", reasoning_effort)):
        if value is not None and not chat:
            raise RequestError(f"{name}: is part of a chat; add --chat or leave it out", field=name)
    changes = sampling.changes()
    text = read_prompt(prompt, file)

    from slipstream.cli.load import load_llm, summary, usage

    llm = load_llm(model, engine)
    if chat:
        changes.setdefault("max_new_tokens", None)
    params = llm.default_params.replace(**changes)
    stream: ChatStream | Stream
    if chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": text})
        stream = llm.submit_chat(messages, params, reasoning_effort=reasoning_effort)
    else:
        stream = llm.submit(text, params)
    try:
        if params.n == 1 and not as_json:
            print_stream(stream)
        output = stream.result()
    except KeyboardInterrupt:
        write("" if as_json else "\n")
        raise
    finally:
        stream.cancel()
    used = usage(llm, output)
    if as_json:
        print_json({"model": model, **_as_dict(output), "usage": used})
    else:
        _print_rest(llm, output)
        note(summary(used))
    note_late(output, params.deadline)
    failed = [c.error for c in output.outputs if c.finish_reason == "error"]
    if failed:
        note(f"error: {failed[0]}")
        raise typer.Exit(1)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from where it was said to be.

    Raises:
        RequestError: nowhere, in two places, not to be read, or not UTF-8.
    """
    if file is not None and prompt is not None:
        raise RequestError("prompt: there is one on the command line and one in --file; give one of the two")
    if prompt is not None and prompt != "-":
        return prompt
    if file is None and prompt is None and sys.stdin.isatty():
        raise RequestError("prompt: there is none; write it after the model, pipe it in, or name a --file")
    try:
        raw = file.read_bytes() if file is not None else sys.stdin.buffer.read()
        return raw.decode().removesuffix("\n").removesuffix("\r")
    except OSError as e:
        raise RequestError(f"--file: {file} cannot be read: {e.strerror or e}; check the path") from e
    except UnicodeDecodeError as e:
        what = f"--file: {file}" if file is not None else "prompt: standard input"
        raise RequestError(f"{what} is not UTF-8 at byte {e.start}; convert it first, such as with iconv") from e


def _print_rest(llm: LLM, output: RequestOutput) -> None:
    """What is not printed as it is written: several answers, and log-probabilities."""
    answers = [a.content for a in getattr(output, "answers", [])] or [c.text for c in output.outputs]
    for c, answer in zip(output.outputs, answers, strict=True):
        if len(answers) > 1:
            end = "deadline" if is_late(c) else c.finish_reason
            write(f"{'' if c.index == 0 else chr(10)}--- answer {c.index + 1} of {len(answers)} ({end})\n")
            write(f"{answer}\n")
    if output.prompt_logprobs is not None:
        _print_logprobs(llm, "log-probabilities of the prompt", output.prompt_token_ids, output.prompt_logprobs)
    for c in output.outputs:
        if c.logprobs is not None:
            which = f" of answer {c.index + 1}" if len(answers) > 1 else ""
            _print_logprobs(llm, f"log-probabilities{which}", c.token_ids, c.logprobs)


def _print_logprobs(llm: LLM, title: str, tokens: Sequence[int], values: Sequence[TokenLogprob | None]) -> None:
    def spell(token: int) -> str:
        return repr(llm.tokenizer.decode([token], skip_special_tokens=False))

    rows = []
    for token, value in zip(tokens, values, strict=False):
        if value is None:  # nothing predicts the first token
            rows.append((str(token), spell(token), "", "", ""))
            continue
        others = "  ".join(f"{spell(t)} {p:.3f}" for t, p in value.top)
        rows.append((str(token), spell(token), f"{value.logprob:.3f}", str(value.rank), others))
    write("\n")
    print_tables([Table(title, rows, ("id", "token", "logprob", "rank", "likeliest"))])


def _as_dict(output: RequestOutput) -> dict[str, Any]:
    """A RequestOutput for JSON: without the clock's readings, which mean nothing outside the process."""
    values: dict[str, Any] = plain(output)
    del values["metrics"]
    return values
