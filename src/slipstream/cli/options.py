"""The options that commands share. A command takes `SamplingOptions` or `EngineOptions` as one parameter;
`flat` shows typer their fields.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from decimal import Decimal
from typing import Annotated, Any, get_type_hints

import typer

from slipstream.errors import ConfigError, RequestError
from slipstream.request import SamplingParams

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A name that `slipstream models` lists, a Hub id (org/name), a folder, or a .gguf file.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else on standard output.")]
System = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="What the model is told before the conversation.", show_default=False),
]
ReasoningEffort = Annotated[
    str | None,
    typer.Option(
        metavar="EFFORT",
        help="How long gpt-oss thinks before it answers: low, medium or high. Default: medium.",
        show_default=False,
    ),
]

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}{end}": 1024 ** (i + 1) for i, letter in enumerate("KMGT") for end in ("", "iB")}
_UNITS |= {f"{letter}B": 1000 ** (i + 1) for i, letter in enumerate("KMGT")}
_UNLIMITED = -1


def parse_size(text: str) -> int:
    """Bytes: a whole number, or a number with a unit such as 2GiB (2 * 1024**3) or 500MB (500 * 1000**2)."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?) ?([A-Za-z]{0,3})", str(text).strip())
    units = {name.lower(): size for name, size in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise typer.BadParameter(f"{text!r} is not a size; write bytes, or a number with a unit, such as 2GiB or 500MB")
    return int(Decimal(match[1]) * units[match[2].lower()])


def parse_limit(text: str) -> int:
    """A number of tokens, or none."""
    if str(text).lower() == "none":
        return _UNLIMITED
    if not re.fullmatch(r"\d{1,10}", str(text)) or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is not a number of tokens; write one of at least 1, or none")
    return int(text)


def _sampling(help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="Sampling", show_default=False, **more)


def _engine(help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="Engine", show_default=False, **more)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The fields of SamplingParams; None is "not given"."""

    max_new_tokens: Annotated[
        int | None,
        _sampling(
            "Most tokens in an answer, or none: until the model stops. Default: 256, in a chat none.",
            parser=parse_limit,
            metavar="TOKENS",
        ),
    ] = None
    min_new_tokens: Annotated[int | None, _sampling("No end before so many tokens. Default: 0.", metavar="TOKENS")] = (
        None
    )
    temperature: Annotated[
        float | None, _sampling("0 always takes the likeliest token; higher is bolder. Default: the model's, else 1.")
    ] = None
    top_k: Annotated[
        int | None, _sampling("Draw from the K likeliest tokens; 0: from all. Default: the model's, else 0.")
    ] = None
    top_p: Annotated[
        float | None,
        _sampling("Draw from the likeliest tokens that make up this probability. Default: the model's, else 1."),
    ] = None
    min_p: Annotated[
        float | None,
        _sampling("Draw from tokens at least this part as likely as the likeliest. Default: the model's, else 0."),
    ] = None
    typical_p: Annotated[
        float | None, _sampling("Locally typical sampling with this probability. Default: the model's, else 1.")
    ] = None
    repetition_penalty: Annotated[
        float | None,
        _sampling("Above 1: tokens seen in prompt or answer become less likely. Default: the model's, else 1."),
    ] = None
    presence_penalty: Annotated[
        float | None, _sampling("Taken once from the logit of each token already in the answer. Default: 0.")
    ] = None
    frequency_penalty: Annotated[
        float | None, _sampling("Taken from a token's logit each time it stands in the answer. Default: 0.")
    ] = None
    logit_bias: Annotated[
        list[str] | None,
        _sampling("Add VALUE to the logit of token ID; -inf forbids it. May be repeated.", metavar="ID=VALUE"),
    ] = None
    seed: Annotated[int | None, _sampling("Makes a sampled answer repeatable. Default: another each time.")] = None
    stop: Annotated[
        list[str] | None,
        _sampling("End the answer before this text ($'\\n' is a line's end in bash). May be repeated.", metavar="TEXT"),
    ] = None
    stop_token_id: Annotated[
        list[int] | None,
        _sampling("End the answer at this token, beside the model's own. May be repeated.", metavar="ID"),
    ] = None
    include_stop_str_in_output: Annotated[
        bool | None, _sampling("Keep the stop text in the answer.", "--include-stop-str-in-output")
    ] = None
    ignore_eos: Annotated[bool | None, _sampling("Go on after the model's own end of an answer.", "--ignore-eos")] = (
        None
    )
    skip_special_tokens: Annotated[
        bool | None, _sampling("Whether to leave special tokens out of the text. Default: leave them out.")
    ] = None
    deadline: Annotated[
        float | None,
        _sampling(
            "End the answer when it is not done by then; what there is of it stays. Default: none.", metavar="SECONDS"
        ),
    ] = None

    def changes(self) -> dict[str, Any]:
        """What was given, as SamplingParams spells it.

        Raises:
            RequestError: it cannot be right, whatever the model's own defaults are.
        """
        given = _given(self)
        if given.get("max_new_tokens") == _UNLIMITED:
            given["max_new_tokens"] = None
        if bias := given.get("logit_bias"):
            given["logit_bias"] = dict(map(_bias, bias))
        if "stop_token_id" in given:
            given["stop_token_ids"] = given.pop("stop_token_id")
        if given.get("temperature") == 0:
            given.setdefault("typical_p", 1.0)  # greedy was asked for, so the model's own typical_p gives way
        SamplingParams(**given)
        return given


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(SamplingOptions):
    """Those and what a conversation on a terminal has no place for."""

    n: Annotated[int | None, typer.Option("--n", help="Independent answers. Default: 1.", show_default=False)] = None
    logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="Report each token's log-probability and the K likeliest alternatives (0: none).",
            show_default=False,
        ),
    ] = None
    prompt_logprobs: Annotated[
        int | None, typer.Option(metavar="K", help="The same for the tokens of the prompt.", show_default=False)
    ] = None
    priority: Annotated[
        int | None,
        typer.Option(help="Lower goes first, with --scheduling-policy priority. Default: 0.", show_default=False),
    ] = None
    cache_salt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Share what is in the cache only where this is the same. Default: none.",
            show_default=False,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The fields of EngineConfig; None is "not given"."""

    device: Annotated[str | None, _engine("cpu, cuda, cuda:N or mps. Default: cuda where there is one.")] = None
    dtype: Annotated[
        str | None, _engine("float32, bfloat16 or float16. Default: the checkpoint's own where it is fast here.")
    ] = None
    quantization: Annotated[
        str | None,
        _engine(
            "auto holds weights as the checkpoint has them; dequantize widens packed ones; mxfp4, int8, int4 quantize. Default: auto."
        ),
    ] = None
    weights: Annotated[
        str | None,
        _engine("random draws them in the shapes of config.json, to measure a model unseen. Default: checkpoint."),
    ] = None
    tensor_parallel_size: Annotated[
        int | None,
        _engine("Ranks that share the model: a GPU each, or a process each on a CPU. Default: 1.", metavar="N"),
    ] = None
    enable_expert_parallel: Annotated[
        bool | None,
        _engine("Ranks have whole experts, instead of a part of each. Default: no.", "--enable-expert-parallel"),
    ] = None
    max_model_len: Annotated[
        int | None, _engine("Longest prompt + answer. Default: the model's own, if memory allows.", metavar="TOKENS")
    ] = None
    max_num_seqs: Annotated[
        int | None, _engine("Answers that are written at the same time. Default: 256 on a large GPU, else 64.")
    ] = None
    max_num_batched_tokens: Annotated[
        int | None, _engine("Tokens computed in one step. Default: 8192 on a large GPU, else 2048.", metavar="TOKENS")
    ] = None
    kv_cache_memory_bytes: Annotated[
        int | None,
        _engine(
            "Memory for keys and values, such as 2GiB. Default: planned from what is free.",
            parser=parse_size,
            metavar="SIZE",
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        float | None, _engine("Part of the free memory that may be used, up to 1. Default: 0.9, on a CPU at most 0.5.")
    ] = None
    page_size: Annotated[
        int | None,
        _engine("Tokens in a page of the KV cache. Default: what suits the model's windows.", metavar="TOKENS"),
    ] = None
    enable_prefix_caching: Annotated[
        bool | None,
        _engine(
            "Keep what was computed for prompts that begin alike. Default: yes.",
            "--enable-prefix-caching/--no-enable-prefix-caching",
        ),
    ] = None
    scheduling_policy: Annotated[
        str | None, _engine("fcfs: first come, first served; priority: the lowest --priority first. Default: fcfs.")
    ] = None
    enforce_eager: Annotated[
        bool | None, _engine("Run every step kernel by kernel, without CUDA graphs.", "--enforce-eager")
    ] = None
    async_scheduling: Annotated[
        bool | None,
        _engine(
            "Launch a step before the tokens of the one before it are looked at. Default: on a GPU.",
            "--async-scheduling/--no-async-scheduling",
        ),
    ] = None
    batch_invariant: Annotated[
        bool | None,
        _engine("Logits with the same bits alone and in any batch; slower. Default: no.", "--batch-invariant"),
    ] = None
    attn_implementation: Annotated[
        str | None,
        _engine("Force an attention that `slipstream explain` lists, or org/name. Default: the fastest that fits."),
    ] = None
    linear_implementation: Annotated[
        str | None, _engine("The same for every matrix that it takes. Default: the fastest that fits.")
    ] = None
    moe_implementation: Annotated[
        str | None, _engine("The same for the experts of a mixture. Default: the fastest that fits.")
    ] = None
    reduce_implementation: Annotated[
        str | None, _engine("The same for small sums over ranks. Default: the fastest that fits.")
    ] = None
    kernels: Annotated[
        list[str] | None,
        _engine(
            "auto, builtin, reference, or OP=REPO (norm, activation, attention, moe, rotary); may be repeated. Default: builtin.",
            metavar="OP=REPO",
        ),
    ] = None
    use_kernels: Annotated[
        bool | None, _engine("The same as --kernels auto, or builtin.", "--use-kernels/--no-use-kernels")
    ] = None
    kernels_lock: Annotated[
        str | None, _engine("The file that pins repositories of kernels. Default: kernels.lock here.", metavar="FILE")
    ] = None
    kernels_policy: Annotated[
        str | None,
        _engine("The file that says which of them may run. Default: kernels-policy.toml here.", metavar="FILE"),
    ] = None
    num_threads: Annotated[int | None, _engine("CPU threads of each rank. Default: torch's choice, one a core.")] = None

    def changes(self) -> dict[str, Any]:
        """What was given, as EngineConfig spells it.

        Raises:
            ConfigError: it cannot be right.
        """
        from slipstream.config import EngineConfig

        given = _given(self)
        if "kernels" in given:
            given["kernels"] = parse_kernels(given["kernels"])
        EngineConfig(**given)
        return given


def parse_kernels(words: Sequence[str]) -> str | dict[str, str]:
    """A word, OP=REPO once or several times, or a JSON object of these.

    Raises:
        ConfigError: an op is named twice, or a word stands beside others.
    """
    text = words[0].strip()
    if len(words) == 1 and text.startswith("{"):
        try:
            found: dict[str, str] = json.loads(text)
            return found
        except ValueError as e:
            raise ConfigError(f"kernels: {text!r} is no JSON object: {e}") from None
    if len(words) == 1 and "=" not in text:
        return text
    pairs = [word.partition("=")[::2] for word in words]
    if wrong := [word for word in words if "=" not in word]:
        raise ConfigError(f"kernels: {wrong[0]!r} beside others is not OP=REPO, such as norm=org/name:Layer")
    if len(dict(pairs)) < len(pairs):
        raise ConfigError(f"kernels: {', '.join(words)} name an op twice")
    return dict(pairs)


def option_name(field: str) -> str | None:
    """--max-new-tokens for max_new_tokens, if a command has such an option."""
    field = {"stop_token_ids": "stop_token_id", "max_shard_bytes": "max_shard_size"}.get(field, field)
    names = {f.name for kind in (AnswerOptions, EngineOptions) for f in fields(kind)}
    names |= {"reasoning_effort", "to", "modules", "skip", "group_size", "max_shard_size", "text"}
    names |= {"batch_size", "input_len", "output_len", "num_prompts", "against", "shape", "plot"}
    return f"--{field.replace('_', '-')}" if field in names else None


def flat(command: Callable[..., None]) -> Callable[..., None]:
    """For each parameter that is a dataclass of options, typer sees its fields instead."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    shown: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        kind = hints[name]
        if is_dataclass(kind):
            groups[name] = kind
            inner = get_type_hints(kind, include_extras=True)
            shown += [
                inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=inner[f.name])
                for f in fields(kind)
            ]
        else:
            shown.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=kind))

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{f.name: values.pop(f.name) for f in fields(kind)})
        command(**values)

    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in shown}
    return run


def _given(options: SamplingOptions | EngineOptions) -> dict[str, Any]:
    values: Mapping[str, Any] = {f.name: getattr(options, f.name) for f in fields(options)}
    return {name: value for name, value in values.items() if value is not None and value != []}


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise RequestError(f"logit_bias: {text!r} is not ID=VALUE, such as 42=-1.5", field="logit_bias") from None
