"""The file of answers: one object a line, in OpenAI's batch format or plain, as the request was."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

from slipstream.errors import CapacityError, RequestError, SlipstreamError
from slipstream.jobs.lines import Line
from slipstream.request import Completion, RequestOutput, TokenLogprob
from slipstream.tokenizer import Tokenizer

_LEAST = -9999.0  # what OpenAI's API writes for a token that has no probability, as JSON has no infinity


def failure(line: Line, error: SlipstreamError | str) -> dict[str, Any]:
    """The answer to a line that could not be answered. `param` names the field at fault, or is null."""
    known = isinstance(error, RequestError)
    code = "invalid_request" if known else "too_large" if isinstance(error, CapacityError) else "failed"
    about = {"code": code, "message": str(error), "param": error.field if isinstance(error, RequestError) else None}
    if line.kind == "plain":
        return {"line": line.number, "id": line.id, "error": about}
    return {"id": f"batch_req_{line.number}", "custom_id": line.id, "response": None, "error": about}


def answer(line: Line, output: RequestOutput, model: str | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """The answer to a line, as its format has it."""
    new = sum(len(c.token_ids) for c in output.outputs)
    prompt = len(output.prompt_token_ids)
    usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    if line.kind == "plain":
        made = [_plain(output, c) for c in output.outputs]
        more = made[0] if len(made) == 1 else {"outputs": made}
        return {"line": line.number, "id": line.id, **more, **_prompt_logprobs(output), "usage": usage, "error": None}
    chat = line.kind == "chat"
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{line.number}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            _chat_choice(output, c, line, tokenizer) if chat else _choice(c, tokenizer) for c in output.outputs
        ],
        **_prompt_logprobs(output),
        "usage": usage,
    }
    response = {"status_code": 200, "request_id": f"req_{line.number}", "body": body}
    return {"id": f"batch_req_{line.number}", "custom_id": line.id, "response": response, "error": None}


def _prompt_logprobs(output: RequestOutput) -> dict[str, Any]:
    if output.prompt_logprobs is None:
        return {}
    return {"prompt_logprobs": [None if p is None else _score(p) for p in output.prompt_logprobs]}


def _score(p: TokenLogprob) -> dict[str, Any]:
    values = dataclasses.asdict(p)
    return {**values, "logprob": _finite(p.logprob), "top": [[t, _finite(v)] for t, v in p.top]}


def _finite(value: float) -> float:
    return value if math.isfinite(value) else _LEAST


def _plain(output: RequestOutput, c: Completion) -> dict[str, Any]:
    made: dict[str, Any] = {"text": c.text}
    if answers := getattr(output, "answers", None):
        part = answers[c.index]
        made = {"text": part.content}
        if part.reasoning is not None:
            made["reasoning"] = part.reasoning
        if part.tool_calls:
            made["tool_calls"] = [{"name": t.name, "arguments": t.arguments} for t in part.tool_calls]
    made |= {"finish_reason": c.finish_reason, "stop_reason": c.stop_reason}
    return made if c.logprobs is None else {**made, "logprobs": [_score(p) for p in c.logprobs]}


def _chat_choice(output: RequestOutput, c: Completion, line: Line, tokenizer: Tokenizer) -> dict[str, Any]:
    part = getattr(output, "answers", [])[c.index]
    message: dict[str, Any] = {"role": "assistant", "content": part.content}
    if part.reasoning is not None:
        message["reasoning_content"] = part.reasoning
    if part.tool_calls:
        message["tool_calls"] = [
            {"id": f"call_{line.number}_{c.index}_{i}", "type": "function",
             "function": {"name": t.name, "arguments": t.arguments}}
            for i, t in enumerate(part.tool_calls)
        ]  # fmt: skip
    logprobs = None if c.logprobs is None else {"content": [_chat_logprob(p, tokenizer) for p in c.logprobs]}
    reason = "tool_calls" if part.tool_calls and c.finish_reason == "stop" else c.finish_reason
    ends = {"finish_reason": reason, "stop_reason": c.stop_reason}
    return {"index": c.index, "message": message, "logprobs": logprobs, **ends}


def _chat_logprob(p: TokenLogprob, tokenizer: Tokenizer) -> dict[str, Any]:
    def spell(token: int, value: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": data.decode(errors="replace"), "logprob": _finite(value), "bytes": list(data)}

    return {**spell(p.token_id, p.logprob), "top_logprobs": [spell(t, v) for t, v in p.top]}


def _choice(c: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    logprobs = None if c.logprobs is None else _logprobs(c.logprobs, tokenizer)
    ends = {"finish_reason": c.finish_reason, "stop_reason": c.stop_reason}
    return {"index": c.index, "text": c.text, "logprobs": logprobs, **ends}


def _logprobs(values: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    tokens = [tokenizer.token_bytes(p.token_id).decode(errors="replace") for p in values]
    top = [{tokenizer.token_bytes(t).decode(errors="replace"): _finite(v) for t, v in p.top} for p in values]
    offsets = [0]
    for token in tokens[:-1]:
        offsets.append(offsets[-1] + len(token))
    scores = [_finite(p.logprob) for p in values]
    return {"tokens": tokens, "token_logprobs": scores, "top_logprobs": top, "text_offset": offsets[: len(tokens)]}
