"""How well a model predicts a text: to compare a model with what quantization made of it."""

from __future__ import annotations

import math

from slipstream.errors import ConfigError, RequestError
from slipstream.llm import LLM
from slipstream.request import SamplingParams

_TOGETHER = 32  # windows that are asked for at once


def perplexity(llm: LLM, text: str, *, window: int = 512) -> float:
    """exp of the mean negative log-likelihood of the tokens of a text; lower is better.

    The convention: the text is tokenized once, with the special tokens that a prompt would get, and cut into windows that
    follow each other without overlap. Each is scored alone, so its first token is context only; the mean is over all
    tokens that were predicted, in all windows. Numbers of different windows or tokenizers cannot be compared.

    Args:
        window: tokens; at most the longest prompt that the model takes.

    Raises:
        ConfigError: the window is shorter than 2 or longer than the model takes.
        RequestError: the text has fewer than 2 tokens.
    """
    if not isinstance(llm, LLM):
        raise ConfigError(f"llm: must be an LLM, got {type(llm).__name__}; write perplexity(LLM(model), text)")
    most = llm.plan.max_model_len - 1
    if not isinstance(window, int) or not 2 <= window <= most:
        raise ConfigError(f"window: must be a whole number from 2 to {most}, got {window!r}")
    ids = llm.tokenizer.encode(text)
    if len(ids) < 2:
        raise RequestError(f"text: has {len(ids)} tokens, and perplexity needs at least 2", field="text")
    windows = [w for at in range(0, len(ids), window) if len(w := ids[at : at + window]) > 1]
    params = SamplingParams(temperature=0, max_new_tokens=1, prompt_logprobs=0)
    scores: list[float] = []
    for at in range(0, len(windows), _TOGETHER):
        for output in llm.generate(windows[at : at + _TOGETHER], params):
            scores += [-token.logprob for token in output.prompt_logprobs or () if token is not None]
    mean = math.fsum(scores) / len(scores)
    return math.inf if mean > 700 else math.exp(mean)  # NaN stays NaN
