"""`slipstream chat`: a conversation in a pipe, and on a real terminal where Ctrl-C stops the answer alone."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from slipstream import LLM, SamplingParams
from tests.cli.conftest import Run
from tests.cli.tiny import SPECIAL, write_chat_model

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "-c", "from slipstream.cli.main import main; main()"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TERM": "dumb", "OMP_NUM_THREADS": "1"}
GREEDY = ("--temperature", "0", "--max-new-tokens", "6", "--ignore-eos")


def turns(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture(scope="module")
def llm(model: str) -> LLM:
    return LLM(model)


def test_each_line_is_a_turn_of_one_conversation(slipstream: Run, model: str, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True)
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}]
    expected = []
    for text in ("Hello", "And you?"):
        output = llm.chat([*messages, {"role": "user", "content": text}], params)
        messages += [{"role": "user", "content": text}, output.message]
        expected.append(output)

    ran = slipstream("chat", model, "--system", "Be brief.", *GREEDY, "--json", stdin="Hello\n\nAnd you?\n")
    assert (ran.code, ran.err) == (0, "")
    got = turns(ran.out)
    assert [t["content"] for t in got] == [o.text for o in expected]
    assert [t["usage"]["prompt_tokens"] for t in got] == [len(o.prompt_token_ids) for o in expected]
    assert [(t["role"], t["finish_reason"], t["reasoning"]) for t in got] == [("assistant", "length", None)] * 2

    plain = slipstream("chat", model, "--system", "Be brief.", *GREEDY, stdin="Hello\nAnd you?")
    assert plain.out == "".join(o.text + "\n" for o in expected)


def test_clear_forgets_and_exit_leaves(slipstream: Run, model: str) -> None:
    ran = slipstream("chat", model, *GREEDY, "--json", stdin="Hello\nHello\n/clear\nHello\n/exit\nHello\n")
    sizes = [t["usage"]["prompt_tokens"] for t in turns(ran.out)]
    assert len(sizes) == 3 and sizes[0] == sizes[2] < sizes[1]
    assert "forgotten" in ran.err


def test_help_and_unknown_commands(slipstream: Run, model: str) -> None:
    ran = slipstream("chat", model, stdin="/help\n/nosuch\n")
    assert ran.code == 2 and ran.out == ""
    assert "/clear" in ran.err and "error: /nosuch: there is no such command" in ran.err


def test_a_path_is_no_command(slipstream: Run, model: str) -> None:
    ran = slipstream("chat", model, *GREEDY, "--json", stdin="/usr/bin\n/etc is a folder\n")
    assert len(turns(ran.out)) == 2


class Terminal:
    """The program on a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [*PROGRAM, *words], ENVIRONMENT)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def until(self, text: str, seconds: float = 60) -> str:
        """What is printed up to and with `text`."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            if not select.select([self.fd], [], [], max(0, end - time.monotonic()))[0]:
                raise AssertionError(f"no {text!r} in {self.seen!r}")
            try:
                self.seen += os.read(self.fd, 4096).decode(errors="replace")
            except OSError:  # the other end is closed
                raise AssertionError(f"no {text!r} in {self.seen!r} before the end") from None
        at = self.seen.index(text) + len(text)
        found, self.seen = self.seen[:at], self.seen[at:]
        return found

    def more(self, characters: int) -> None:
        """Wait until so much more is printed."""
        while len(self.seen) < characters:
            self.seen += os.read(self.fd, 4096).decode(errors="replace")

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        os.close(self.fd)


def test_ctrl_c_stops_the_answer_and_ctrl_d_the_program(tmp_path: Path) -> None:
    folder = str(write_chat_model(tmp_path / "long", max_position_embeddings=65536))  # half a minute to write
    no_prompt_in_the_answer = f"{len(SPECIAL) + ord('>') - 33}=-inf"
    terminal = Terminal("chat", folder, "--ignore-eos", "--logit-bias", no_prompt_in_the_answer)
    try:
        terminal.until("> ")
        terminal.type("Hello\n")
        terminal.until("Hello\r\n")
        terminal.more(100)
        terminal.type("\x03")
        answer = terminal.until("\r\n> ")
        assert "Traceback" not in answer
        time.sleep(0.3)  # readline shows the prompt a moment before it listens for signals
        terminal.type("\x03")  # at the prompt it is no more than a hint
        terminal.until("/exit leaves")
        terminal.type("Go on\n")
        terminal.until("Go on\r\n")
        terminal.more(100)
        terminal.type("\x03")
        terminal.until("\r\n> ")
        terminal.type("/nosuch\n")
        terminal.until("error: /nosuch")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.wait() == 0
    finally:
        terminal.close()


def test_ctrl_c_while_generating_ends_with_130(tmp_path: Path) -> None:
    folder = str(write_chat_model(tmp_path / "long", max_position_embeddings=65536))
    words = [*PROGRAM, "generate", folder, "x", "--ignore-eos", "--max-new-tokens", "none"]
    with subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(50)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.endswith(b"\n") and err == b""


def test_who_stops_reading_gets_no_complaint(tmp_path: Path) -> None:
    folder = str(write_chat_model(tmp_path / "long", max_position_embeddings=65536))
    words = [*PROGRAM, "generate", folder, "x", "--ignore-eos", "--max-new-tokens", "none"]
    with subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(50)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


def test_the_answer_so_far_stays_in_the_conversation(model: str, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from slipstream.cli import chat

    params = SamplingParams(temperature=0, max_new_tokens=200, ignore_eos=True)
    conversation = chat.Conversation(llm, params, None, None, False)

    def print_and_interrupt(stream: Any) -> None:
        for i, _ in enumerate(stream):
            if i == 4:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chat, "print_stream", print_and_interrupt)
    before = signal.getsignal(signal.SIGINT)
    conversation.turn("Hello")
    assert signal.getsignal(signal.SIGINT) is before
    user, answer = conversation.messages
    whole = llm.chat([user], params).text
    assert answer["role"] == "assistant" and 0 < len(answer["content"]) < len(whole)
    assert whole.startswith(answer["content"])
    conversation.turn("And?")  # the engine is whole
    assert len(conversation.messages) == 4
