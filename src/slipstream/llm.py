"""The offline front: load a model by name, then generate, stream and chat."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, overload

from slipstream.checkpoint.files import no_collection
from slipstream.checkpoint.open import Checkpoint, open_checkpoint, open_random
from slipstream.config import EngineConfig, ModelConfig
from slipstream.errors import CheckpointError, RequestError
from slipstream.llm_batch import Bar, BatchRun, pairs
from slipstream.request import Request, RequestOutput, SamplingParams, as_token_ids
from slipstream.tokenizer import Tokenizer

if TYPE_CHECKING:
    from slipstream.conversation import ChatDelta, ChatOutput, ChatStream, Messages, Parser
    from slipstream.engine.engine import Stream
    from slipstream.engine.snapshot import Snapshot
    from slipstream.engine.worker import Crew

Prompt = str | Sequence[int]


class LLM:
    """A model ready to answer.

    Args:
        model: a name that `slipstream models` lists, a Hub id, a folder, or a .gguf file.
        progress: called with (bytes read, bytes in all) while weights load.
        compiling: called with (kernels compiled, kernels in all) where a GPU's have to be, which is once for each card and model.
        options: fields of EngineConfig, such as dtype="bfloat16" or max_model_len=4096.

    Raises:
        ConfigError, CheckpointError, KernelError, TrustError, CapacityError: it cannot run as asked; the message says why.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        progress: Callable[[int, int], None] | None = None,
        compiling: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> None:
        asked = EngineConfig(**options)
        with no_collection():
            self._start(model, asked, progress)
            from slipstream.engine.warm import warm

            warm(self.engine.runner, compiling)  # other ranks of this machine find in Triton's cache what it compiles
        self._ids = itertools.count()

    def _start(
        self, model: str | os.PathLike[str], asked: EngineConfig, progress: Callable[[int, int], None] | None
    ) -> None:
        if asked.tensor_parallel_size > 1 and os.environ.get("RANK") == "0":
            from slipstream.parallel.launcher import announce, refuse_other_size

            refuse_other_size(asked.tensor_parallel_size)
            announce()  # fetching a model may take long, and other ranks wait
        from slipstream.sources import resolve

        random = asked.weights == "random"
        path = resolve(model, weights=not random)
        checkpoint = open_random(path, asked.seed or 0) if random else open_checkpoint(path)
        self.model_config = ModelConfig.from_hf(checkpoint.config)
        # Only the devices named in EngineConfig are used: packages that bring others are neither looked for nor run.
        os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
        import torch

        from slipstream.engine.engine import Engine
        from slipstream.engine.worker import gather

        crew = gather(asked, self.model_config, str(path))
        try:
            if crew is not None:
                asked, progress = crew.asked, crew.watched(progress)
            if asked.num_threads is not None:
                torch.set_num_threads(asked.num_threads)
            self._load(checkpoint, asked, crew, progress)
            self.default_params = _default_params(checkpoint.generation_config)
            eos = _eos(checkpoint.generation_config, self.model_config, self.tokenizer)
            self.engine = Engine(self.plan, self.tokenizer, eos, crew)
        except BaseException:
            if crew is not None:
                crew.close()
            raise

    def _load(
        self,
        checkpoint: Checkpoint,
        asked: EngineConfig,
        crew: Crew | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        from slipstream.checkpoint.load import load
        from slipstream.plan import make_plan

        self.plan = make_plan(asked, checkpoint, self.model_config) if crew is None else crew.plan(checkpoint)
        with ThreadPoolExecutor(1) as beside:  # reading weights leaves the interpreter free
            building = beside.submit(_tokenizer, checkpoint)
            began = time.perf_counter()
            load(self.plan.model, self.plan.loads, checkpoint, self.plan.device, progress)
            self.load_seconds = time.perf_counter() - began
            self.tokenizer = building.result()

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a sequence of str too; the first one wins
        self, prompts: str, params: SamplingParams | None = None
    ) -> RequestOutput: ...
    @overload
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams | None = None) -> list[RequestOutput]: ...
    def generate(self, prompts: Any, params: SamplingParams | None = None) -> RequestOutput | list[RequestOutput]:
        """Continue one prompt (gives one RequestOutput) or a list of them (gives a list in the same order).

        A prompt is text, or a list of token ids. Prompts of a list run together, whatever their lengths.

        Args:
            params: None takes the checkpoint's generation_config where it has one.

        Raises:
            RequestError, CapacityError: a prompt cannot be served; nothing of the list was run.
        """
        single = isinstance(prompts, str)
        if not single and not isinstance(prompts, (list, tuple)):
            raise RequestError(f"prompts: must be a text or a list, got {type(prompts).__name__}", field="prompts")
        if not single:
            _refuse_one_prompt(prompts)
        streams = []
        try:
            for prompt in [prompts] if single else prompts:
                streams.append(self.submit(prompt, params))
            outputs = [s.result() for s in streams]
        except BaseException:
            for s in streams:
                s.cancel()
            raise
        return outputs[0] if single else outputs

    def generate_batch(
        self,
        prompts: Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams | None] | None = None,
        *,
        ordered: bool = True,
        on_result: Callable[[RequestOutput], object] | None = None,
        progress: bool | Callable[[Snapshot], object] | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """Continue any number of prompts, and give each result as soon as it may be had.

        Prompts are taken from the iterable as there is room, so it may be a generator of millions; the engine runs while
        results are asked for. A prompt that cannot be served ends in `error`, with the message in
        `output.outputs[0].error`, as does one in a forward pass that fails; all others go on. Leaving the loop early
        (break and `close()`, an exception, Ctrl-C) cancels what is queued and frees its pages; nothing is said of these
        to `on_result`.

        Args:
            params: one for all, or one for each prompt; None takes the checkpoint's generation_config where it has one.
            ordered: results come in the order of the prompts. False gives each as it finishes.
            on_result: called with each result as it finishes, before it is given. If it raises, that result ends in
                `error` with what was raised as the message, and nothing else is touched.
            progress: None or True draws a bar on standard error where that is a terminal; False does not; a callable
                gets a Snapshot about ten times a second and one at the end. What it raises ends the batch.

        Raises:
            RequestError: `prompts` is a single prompt, or there are not as many `params` as prompts.

        >>> for output in llm.generate_batch(open("prompts.txt"), SamplingParams(max_new_tokens=32)):
        ...     print(output.text)
        """
        if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
            what = "[prompt] for a single one" if isinstance(prompts, str) else f"got {type(prompts).__name__}"
            raise RequestError(f"prompts: must be a list or another iterable of prompts; {what}", field="prompts")
        _refuse_one_prompt(prompts)
        if not (params is None or isinstance(params, (SamplingParams, Iterable))) or isinstance(params, (str, Mapping)):
            what = f"got {type(params).__name__}"
            raise RequestError(f"params: must be one SamplingParams or one for each prompt, {what}", field="params")
        total = len(prompts) if isinstance(prompts, Sized) else None
        if total is not None and isinstance(params, Sized) and len(params) != total:
            raise RequestError(f"params: {len(params)} for {total} prompts; give one for each or one", field="params")
        bar = Bar(total) if progress is None or progress is True else None
        report: Callable[[Snapshot, int], object] | None = bar
        if callable(progress):
            report = _without_count(progress)
        run = BatchRun(
            self.make_request,
            self.engine,
            pairs(prompts, params),
            ordered=ordered,
            on_result=on_result,
            report=report,
        )
        return _closing(run, bar)

    def snapshot(self) -> Snapshot:
        """What the engine is doing: its queue, pages, counts and speed."""
        return self.engine.snapshot()

    def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """Queue a prompt; the `Stream` that comes back gives tokens as they are made. See engine.Stream."""
        return self.engine.submit(self.make_request(prompt, params))

    def make_request(self, prompt: Prompt, params: SamplingParams | None = None) -> Request:
        """Check and tokenize a prompt; nothing is queued.

        Raises:
            RequestError: it is no text and no list of token ids, or `params` are no SamplingParams.
        """
        if params is not None and not isinstance(params, SamplingParams):
            raise RequestError(f"params: must be one SamplingParams, got {type(params).__name__}", field="params")
        if isinstance(prompt, str):
            ids = as_token_ids(self.tokenizer.encode(prompt), self.model_config.vocab_size)
            text: str | None = prompt
        else:
            ids, text = as_token_ids(prompt, self.model_config.vocab_size), None
        return Request(f"req-{next(self._ids)}", ids, params or self.default_params, text)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """The text of one answer, piece by piece. Closing the iterator ends the request."""
        params = params or self.default_params
        if params.n != 1:
            raise RequestError(f"n: a stream of text carries one answer, not {params.n}; use submit", field="n")
        stream = self.submit(prompt, params)
        try:
            for delta in stream:
                if delta.text:
                    yield delta.text
        finally:
            stream.cancel()

    def chat(self, messages: Messages, params: SamplingParams | None = None, **options: Any) -> ChatOutput:
        """Answer a conversation. `options` are those of submit_chat.

        >>> llm.chat([{"role": "user", "content": "Explain gravity to a child."}]).message["content"]
        """
        stream = self.submit_chat(messages, params, **options)
        try:
            return stream.result()
        except BaseException:
            stream.cancel()
            raise

    def stream_chat(
        self, messages: Messages, params: SamplingParams | None = None, **options: Any
    ) -> Iterator[ChatDelta]:
        """The answer to a conversation, piece by piece. Closing the iterator ends the request."""
        stream = self.submit_chat(messages, params, **options)
        try:
            yield from stream
        finally:
            stream.cancel()

    def submit_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        reasoning_effort: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_variables: Any,
    ) -> ChatStream:
        """Queue a conversation's next answer.

        Args:
            messages: dicts with "role" and "content", oldest first.
            params: None takes the checkpoint's generation_config and lets the model end its turn, however long.
            reasoning_effort: how long to think before the answer; gpt-oss knows low, medium and high.
            tools: the functions that the model may call, as OpenAI's API describes them.
            add_generation_prompt: end the prompt with the words that begin the model's turn.
            template_variables: whatever else the chat template reads, such as enable_thinking.

        Raises:
            RequestError: the conversation is not valid or too long, the model has no chat template, or its format
                has no use for an option that was given.
        """
        from slipstream import conversation  # here, as it loads jinja2, which a plain `generate` does not need

        request, parsers = self.make_chat_request(
            messages,
            params,
            reasoning_effort=reasoning_effort,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **template_variables,
        )
        return conversation.ChatStream(self.engine.submit(request), parsers)

    def make_chat_request(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        reasoning_effort: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_variables: Any,
    ) -> tuple[Request, list[Parser]]:
        """Render and tokenize a conversation; nothing is queued. Arguments and errors are those of submit_chat.

        Returns:
            the request, and what parts each of its answers into reasoning, answer and tool calls.
        """
        from slipstream import conversation

        harmony = self.model_config.model_type == "gpt_oss"
        prompt = conversation.render_prompt(
            self.tokenizer,
            messages,
            harmony=harmony,
            reasoning_effort=reasoning_effort,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            variables=template_variables,
        )
        params = params or self.default_params.replace(max_new_tokens=None)
        ids = self.tokenizer.encode(prompt, add_special_tokens=False)  # the template has written its own
        seen = conversation.engine_params(self.tokenizer, params, harmony=harmony)
        checked = as_token_ids(ids, self.model_config.vocab_size)
        request = Request(f"req-{next(self._ids)}", checked, seen, prompt)
        return request, conversation.open_parsers(self.tokenizer, params, harmony=harmony)


def _refuse_one_prompt(prompts: object) -> None:
    if isinstance(prompts, (list, tuple)) and prompts and all(isinstance(p, int) for p in prompts):
        raise RequestError("prompts: for one prompt of token ids give a list that holds it: [[1, 2]]", field="prompts")


def _without_count(progress: Callable[[Snapshot], object]) -> Callable[[Snapshot, int], object]:
    return lambda snapshot, _: progress(snapshot)


def _closing(run: BatchRun, bar: Bar | None) -> Generator[RequestOutput, None, None]:
    try:
        yield from run.results()
    finally:
        if bar is not None:
            bar.close()


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    if checkpoint.kind == "gguf":
        return Tokenizer.from_gguf(checkpoint.metadata)
    if checkpoint.kind == "random" and not (checkpoint.path / "tokenizer.json").exists():
        return Tokenizer.of_bytes()
    return Tokenizer.from_folder(checkpoint.path)


def _default_params(generation: Mapping[str, Any]) -> SamplingParams:
    """What generation_config.json recommends; greedy only if it says so."""
    names = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
    values = {n: generation[n] for n in names if generation.get(n) is not None}
    if generation.get("do_sample") is False:
        values = {n: v for n, v in values.items() if n == "repetition_penalty"} | {"temperature": 0.0}
    try:
        return SamplingParams(**values)
    except RequestError as e:
        raise CheckpointError(f"generation_config.json: {e}") from e


def _eos(generation: Mapping[str, Any], config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every end-of-sequence token that the checkpoint names anywhere."""
    value = generation.get("eos_token_id", ())
    named = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return tuple(sorted({t for t in (*named, *config.eos_token_ids, *tokenizer.eos_token_ids) if isinstance(t, int)}))
