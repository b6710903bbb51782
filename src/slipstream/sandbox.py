"""A jinja2 sandbox for programs from strangers: chat templates.

Jinja2's own sandbox keeps a template from our objects, but not from our time and memory: `'a' * 10**9` is allowed
there. Here every operation that can take long or grow is routed through a `Budget`: operators, calls, filters, tests,
loops, literals and output. Each one looks at the clock, is refused beforehand where its result would be too large, and
pays for the memory of what it made.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from string import Formatter
from typing import Any

import jinja2
import markupsafe
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

_MAX_ITEMS = 100_000  # in one sequence or loop
_MAX_WIDTH = 1000  # of padding and indentation, digits of rounding
_MAX_BITS = 10_000  # of a whole number

_VIEWS: tuple[Any, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_CONTAINERS: tuple[Any, ...] = (list, tuple, dict, *_VIEWS)
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The attributes of plain values that a template may touch; those that can grow are guarded in `Budget.method`.
_ATTRIBUTES: dict[type, frozenset[str]] = {
    str: _names(
        "capitalize casefold center count endswith expandtabs find format format_map index isalnum isalpha isascii"
        " isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip"
        " partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines"
        " startswith strip swapcase title upper zfill"
    ),
    dict: _names("copy get items keys values"),
    list: _names("copy count index"),
    tuple: _names("count index"),
    int: frozenset(),
    float: _names("is_integer"),
    bytes: frozenset(),
    type: frozenset(),
}
_FILTERS = _names(
    "abs attr batch capitalize center count d default dictsort e escape first float format groupby indent int items"
    " join last length list lower map max min reject rejectattr replace reverse round safe select selectattr slice sort"
    " string sum title tojson trim truncate unique upper urlencode wordcount"
)
_BY_ITEM = _names(  # those that go over a text letter by letter, or word by word
    "batch dictsort groupby list map max min reject rejectattr select selectattr slice sort title unique urlencode"
    " wordcount"
)
_SIZED = _names("batch center indent round slice tojson")  # a number given to these is a size


class Stopped(Exception):
    """A limit was reached. No ValueError: jinja2 catches those here and there."""


class Refused(Exception):
    """The template itself does not accept the messages."""


class Budget:
    """What one rendering may still spend: seconds until a deadline, and bytes for all values it makes."""

    def __init__(self, max_chars: int, seconds: float) -> None:
        self.max_text = 4 * max_chars  # of one value inside the template
        self._bytes = 64 * max_chars
        self._seconds = seconds
        self._deadline = time.perf_counter() + seconds
        self._weights: dict[int, tuple[Any, int]] = {}  # by id; the value itself is kept so that the id stays its own

    def tick(self) -> None:
        if time.perf_counter() > self._deadline:
            raise Stopped(f"it ran for more than {self._seconds:g} s")

    def allow(self, size: int, what: str = "a text") -> None:
        """Refuse a result of `size` characters (or as many bytes of list) before it is made."""
        if size > self.max_text:
            raise Stopped(f"it would make {what} of size {size}, more than {self.max_text}")

    def pay(self, size: int) -> None:
        self._bytes -= size
        if self._bytes < 0:
            raise Stopped("it used up the memory it may take")

    def made(self, value: Any, item_bytes: int = 16) -> Any:
        """Account for a value that the template made."""
        self.tick()
        if isinstance(value, str):
            self.allow(len(value))
            self.pay(len(value) * (1 if value.isascii() else 4))
        elif isinstance(value, _CONTAINERS):
            if len(value) > _MAX_ITEMS:
                raise Stopped(f"it made a list of {len(value)} items, more than {_MAX_ITEMS}")
            self.pay(64 + item_bytes * len(value))
            self.allow(self.weigh(value), "a nested value")
        elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise Stopped(f"it made a number of {value.bit_length()} bits, more than {_MAX_BITS}")
        return value

    def weigh(self, value: Any) -> int:
        """Characters that a value takes when written out, about: a list that holds one list twice counts it twice."""
        if isinstance(value, str):
            return 16 + len(value)
        if not isinstance(value, _CONTAINERS):
            return 16
        if (known := self._weights.get(id(value))) is not None:
            return known[1]
        children: Iterable[Any] = value
        weight = 16
        if isinstance(value, dict):
            weight += sum(map(self.weigh, value))
            children = value.values()
        for child in children:
            weight += self.weigh(child)
        if not isinstance(value, _VIEWS):
            self._weights[id(value)] = (value, weight)
        return weight

    def over(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, with a look at the clock for each."""
        for count, item in enumerate(items):
            self.tick()
            if count >= _MAX_ITEMS:
                raise Stopped(f"a loop ran over more than {_MAX_ITEMS} items")
            yield item

    # -- operators ----------------------------------------------------------------------------------------------

    def binary(self, operator: str, work: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
        self.tick()
        if operator == "%" and isinstance(left, str):
            return self.printf(left, right)
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            self.allow(len(left) + len(right))
        elif operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, (str, list, tuple)) and isinstance(times, int):
                    self.allow(len(many) * max(times, 0) * (1 if isinstance(many, str) else 16))
            if isinstance(left, int) and isinstance(right, int):
                self._bits(left.bit_length() + right.bit_length())
        elif operator == "**" and isinstance(left, int) and isinstance(right, int) and right > 0:
            self._bits(left.bit_length() * right)
        return self.made(work(left, right))

    def _bits(self, bits: int) -> None:
        if bits > _MAX_BITS + 64:
            raise Stopped(f"it would make a number of {bits} bits, more than {_MAX_BITS}")

    def printf(self, text: str, args: Any) -> str:
        """`text % args` with widths and total size bounded."""
        specs = text.split("%")[1:]
        if len(specs) > _MAX_WIDTH:
            raise Stopped(f"it formats {len(specs)} values at once")
        for spec in specs:  # "(key)", then flags, width and precision up to the letter
            size = re.match(r"(?:\(.*?\))?([^a-zA-Z]*)", spec, re.DOTALL)
            if size and ("*" in size[1] or re.search(r"\d{4}", size[1])):
                raise Stopped("it pads with '%' to a width that is too large or not written out")
        self.allow(len(text) + len(specs) * (_MAX_WIDTH if re.search(r"%[^%a-zA-Z]*\d", text) else 0))
        self.allow(len(specs) * self.weigh(args))
        result: str = self.made(text % args)
        return result

    def concat(self, *parts: Any) -> str:
        """The `~` operator."""
        texts = [p if isinstance(p, str) else str(self.made(p)) for p in parts]
        self.allow(sum(map(len, texts)))
        result: str = self.made("".join(texts))
        return result

    def show(self, value: Any) -> str:
        """A value on its way into the output, or into a buffer that becomes a value."""
        result: str = self.made(value if isinstance(value, str) else str(value))
        return result

    # -- methods of strings -------------------------------------------------------------------------------------

    def method(self, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `text.name(...)`, refused beforehand where the result would be too large or the search quadratic."""
        if name == "join":
            return self.join(text, *args, **kwargs)
        if name == "replace" and len(args) >= 2 and all(isinstance(a, str) for a in args[:2]):
            found = text.count(args[0])
            if len(args) > 2 and isinstance(args[2], int) and args[2] >= 0:
                found = min(found, args[2])
            self.allow(len(text) + found * (len(args[1]) - len(args[0])))
        elif name in ("center", "ljust", "rjust", "zfill"):
            self.allow(max((a for a in args if isinstance(a, int)), default=0))
        elif name == "expandtabs":
            width = max(a for a in (*args, *kwargs.values(), 8) if isinstance(a, int))
            self.allow(len(text) + text.count("\t") * width)
        elif name in ("split", "rsplit"):
            sep = args[0] if args else kwargs.get("sep")
            limit = args[1] if len(args) > 1 else kwargs.get("maxsplit", -1)
            most = _MAX_ITEMS + 1
            args, kwargs = (sep, min(limit, most) if isinstance(limit, int) and limit >= 0 else most), {}
        elif name == "splitlines" and sum(map(text.count, _LINE_ENDS)) >= _MAX_ITEMS:
            raise Stopped(f"it split a text into more than {_MAX_ITEMS} lines")
        if name in ("rfind", "rindex", "rsplit", "rpartition"):  # searched backwards, Python takes length * length
            sizes = [len(a) for a in args if isinstance(a, str)]
            if sizes and len(text) * sizes[0] > 10**8:
                raise Stopped("it searched a long text backwards for a long text")
        return self.made(getattr(text, name)(*args, **kwargs), item_bytes=80)

    def join(self, between: str, items: Iterable[Any]) -> str:
        texts: list[str] = []
        size = 0
        for item in self.over(items):
            texts.append(item if isinstance(item, str) else str(item))
            size += len(texts[-1]) + len(between)
            self.allow(size)
        result: str = self.made(between.join(texts))
        return result


class _Namespace(Namespace):
    def __repr__(self) -> str:  # jinja2's writes out what is inside, which may hold itself many times over
        return "<Namespace>"


class _Meter(NodeTransformer):
    """Rewrites a template's syntax tree so that what jinja2 does by itself goes through the budget too."""

    def _through(self, name: str, *args: nodes.Expr, lineno: int) -> nodes.Expr:
        call = nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)
        call.set_lineno(lineno)
        return call

    def _made(self, node: Any) -> nodes.Expr:
        self.generic_visit(node)
        return self._through("made", node, lineno=node.lineno)

    visit_List = visit_Dict = visit_Compare = _made

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        if node.ctx == "load":
            return self._made(node)
        return node  # the names on the left of an assignment

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        if isinstance(node.arg, nodes.Slice):  # jinja2 slices without asking the sandbox
            return self._made(node)
        self.generic_visit(node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return self._through("tilde", *node.nodes, lineno=node.lineno)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Expr:
        return self._through("made", nodes.Const(node.data), lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        items: Any = node.iter
        node.iter = self._through("over", items, lineno=node.lineno)
        return node

    def _refuse(self, node: nodes.Node) -> nodes.Node:
        raise jinja2.TemplateSyntaxError(f"{type(node).__name__} has no place in a chat template", node.lineno)

    visit_Include = visit_Import = visit_FromImport = visit_Extends = _refuse
    visit_EvalContextModifier = visit_ScopedEvalContextModifier = _refuse


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the model wrote, for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(lineno)


class _Formatter(SandboxedFormatter):
    """`str.format` that pays for each field; `env.format_field` knows the budget."""

    def format_field(self, value: Any, format_spec: str) -> str:
        budget: Budget = self._env.budget  # type: ignore[attr-defined]
        if re.search(r"\d{4}", format_spec):
            raise Stopped(f"it pads to the width {format_spec[:40]!r}")
        budget.allow(budget.weigh(value))
        result: str = budget.made(super().format_field(value, format_spec))
        return result


class Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, budget: Budget) -> None:
        # `optimized` would run filters while compiling
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_Generation, loopcontrols],
            finalize=budget.show,
        )
        self.budget = budget
        self.made, self.over, self.tilde = budget.made, budget.over, budget.concat
        ours = {
            "join": self._join,
            "replace": self._replace,
            "tojson": self._tojson,
            "format": self._format,
            "safe": str,
            "e": _escape,
            "escape": _escape,
        }
        filters: dict[str, Any] = {**self.filters, **ours}
        tests: dict[str, Any] = self.tests
        self.filters = {name: self._guard(name, work) for name, work in filters.items() if name in _FILTERS}
        self.tests = {name: self._guard(name, work) for name, work in tests.items()}
        self.globals.update(
            namespace=_Namespace,
            range=_range,
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            lipsum=_no_lipsum,
        )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Meter().visit(super()._parse(source, name, filename))
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, allowed in _ATTRIBUTES.items():
            if isinstance(obj, kind):
                return attr in allowed
        return super().is_safe_attribute(obj, attr, value)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.budget.tick()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.budget.tick()
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        return self.budget.binary(operator, self.binop_table[operator], left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = __self.budget
        budget.tick()
        owner = getattr(__obj, "__self__", None)
        if owner is budget:
            return __obj(*args)
        if isinstance(owner, str) and (name := getattr(__obj, "__name__", "")) not in ("format", "format_map"):
            named = {k: v for k, v in kwargs.items() if k not in ("_loop_vars", "_block_vars")}  # jinja2's own
            return budget.method(str(owner), name, args, named)
        if isinstance(__obj, LoopContext) and args:  # the next level of a recursive loop
            args = (budget.over(args[0]), *args[1:])
        return budget.made(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        text = str(value.__self__)
        if value.__name__ == "format_map":
            return lambda mapping: self._vformat(text, (), mapping)
        return lambda *args, **kwargs: self._vformat(text, args, kwargs)

    def _vformat(self, text: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        result: str = self.budget.made(Formatter.vformat(_Formatter(self), text, args, kwargs))
        return result

    def _guard(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """A filter or test that ticks, refuses large numbers where they mean a size, and pays for its result."""
        budget = self.budget

        @functools.wraps(work)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            budget.tick()
            given = [*args, *kwargs.values()]
            if name in _SIZED:
                sizes = [a for a in given[1:] if isinstance(a, int)]
                if any(abs(a) > _MAX_WIDTH for a in sizes):
                    raise Stopped(f"it gave the filter {name} the number {max(sizes, key=abs)}, more than {_MAX_WIDTH}")
            if name == "indent":
                text = str(given[0])
                lines = 1 + sum(map(text.count, _LINE_ENDS))
                widths = [len(a) if isinstance(a, str) else a for a in given[1:] if isinstance(a, (str, int))]
                budget.allow(len(text) + lines * max([4, *widths]))
            if name == "sum" and any(isinstance(a, (list, tuple)) for a in given[2:]):
                raise Stopped("it summed lists; use + on two lists")
            if name in _BY_ITEM and any(isinstance(a, str) and len(a) > _MAX_ITEMS for a in given):
                raise Stopped(f"the filter {name} went over a text of more than {_MAX_ITEMS} characters")
            return budget.made(work(*args, **kwargs), item_bytes=80)

        return guarded

    def _join(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            value = self.call_filter("map", value, kwargs={"attribute": attribute}, context=self._no_context())
        return self.budget.join(str(d), value)

    def _no_context(self) -> Context:
        return Context(self, {}, None, {})

    def _replace(self, value: Any, old: Any, new: Any, count: int | None = None) -> Any:
        return self.budget.method(str(value), "replace", (str(old), str(new), -1 if count is None else count), {})

    def _format(self, value: Any, *args: Any, **kwargs: Any) -> str:
        return self.budget.printf(str(value), kwargs or args)

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as transformers writes it: no HTML escapes."""
        self.budget.allow(self.budget.weigh(value))
        options = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators, "sort_keys": sort_keys}
        if indent is None and separators is None:
            return json.dumps(value, **options)
        return self.budget.join("", _Chunks(json.JSONEncoder(**options).iterencode(value)))


class _Chunks:
    """Pieces of JSON, in groups, so that a long document stays under the limit on items."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[str]:
        while group := "".join(piece for _, piece in zip(range(64), self._pieces, strict=False)):
            yield group


def _escape(value: Any) -> str:
    return str(markupsafe.escape(value))


def _range(*args: int) -> range:
    numbers = range(*args)
    if abs(numbers.stop - numbers.start) > _MAX_ITEMS * abs(numbers.step):  # len() fails beyond 2**63
        raise Stopped(f"it counted over more than {_MAX_ITEMS} numbers")
    return numbers


def _raise_exception(message: Any) -> None:
    raise Refused(str(message)[:1000])


def _strftime_now(format: str) -> str:
    if len(format) > _MAX_WIDTH:
        raise Stopped(f"it asked for the date in a format of {len(format)} characters")
    return datetime.now().strftime(format)


def _no_lipsum(*args: Any, **kwargs: Any) -> None:
    raise Stopped("it asked for filler text")
