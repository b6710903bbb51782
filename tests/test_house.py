"""The house holds: which module may import which, what stays free of torch, how long a file may be, and what is banned.

All of it is read from the syntax tree or seen in a fresh process.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "slipstream"

# A module imports only what stands before it here. docs/decisions/0001-order-of-modules.md says why it is this order.
ORDER = (
    "errors", "request", "config", "trust", "cache", "batch", "ops", "parallel", "checkpoint",
    "tokenizer_gguf", "tokenizer", "sandbox", "chat", "harmony", "sources", "quantization",
    "layers", "models", "sequence", "scheduler", "hardware", "plan", "engine",
    "conversation", "pump", "llm_batch", "llm", "async_llm", "evaluation", "jobs",
)  # fmt: skip
# The fronts stand below all of these. `cli` may import the others; they do not import each other.
FRONTS = ("server", "bench", "tuning", "bridge", "distributed", "cli")
# Inside these, single files also hold to an order, as others rely on what they leave out.
INSIDE = {
    "cache": ("spec", "budget", "pool", "pages", "storage"),
    "engine": ("graphs", "runner", "worker", "rank", "snapshot", "warm", "engine"),
}
TORCH_FREE = (
    "slipstream", "slipstream.errors", "slipstream.request", "slipstream.config", "slipstream.cache.spec",
    "slipstream.cache.budget",
    "slipstream.cache.pool",
    "slipstream.cache.pages", "slipstream.scheduler", "slipstream.tokenizer", "slipstream.chat", "slipstream.harmony",
    "slipstream.trust", "slipstream.trust.audit", "slipstream.ops.hub",
    "slipstream.sources", "slipstream.checkpoint.safetensors", "slipstream.checkpoint.gguf",
    "slipstream.checkpoint.open", "slipstream.ops.choose",
)  # fmt: skip

MAX_LINES = 400
# Files that are longer, how long they may be, and why. Shorten a file, then its line here.
LONGER = {
    "config.py": (440, "two nouns (EngineConfig, ModelConfig) that the design names as one file"),
    "sandbox.py": (500, "one interpreter of templates with its limits; a cut would part a limit from what it guards"),
}

# Where any exception at all is caught, and why. It is never lost: it goes into the result of the request that it ended.
CATCHES_ALL = {
    "llm_batch.py": "a caller's result handler may raise anything, and only its own result is to say so",
    "pump.py": "a failed pass ends only those that were in it",
    "engine/engine.py": "a caller's `deliver` may raise anything, and only its own request is to end",
    "engine/worker.py": "where a rank's process ends; rank 0 hears what it was, and raises it",
    "parallel/launch.py": "one thread works, another waits, and raises what the first one caught",
    "async_llm.py": "one thread serves all tasks; what it catches is raised where the task waits",
}

FILES = sorted(SRC.rglob("*.py"))


def name_of(file: Path) -> str:
    parts = ("slipstream", *file.relative_to(SRC).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def known(name: str) -> bool:
    path = ROOT / "src" / Path(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports(file: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of every slipstream module imported, at the top or inside a function."""
    package = name_of(file) if file.name == "__init__.py" else name_of(file).rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            names = [f"{base}.{a.name}" if known(f"{base}.{a.name}") else base for a in node.names]
        else:
            continue
        yield from ((node.lineno, n) for n in names if n.split(".")[0] == "slipstream")


def allowed(importer: str, imported: str) -> bool:
    """Whether the order lets `importer` (such as slipstream.batch) import `imported`."""
    here, there = (n.split(".")[1:] for n in (importer, imported))
    if not here:
        return True  # slipstream/__init__ names things, and loads them on first use (test_packaging holds that)
    if not there:
        return here[0] in FRONTS  # for __version__
    if here[0] == there[0]:
        inner = INSIDE.get(here[0])
        if inner is None or len(here) < 2 or len(there) < 2 or here[1] == there[1]:
            return True
        return inner.index(there[1]) < inner.index(here[1])
    if here[0] == "__main__":
        return there == ["cli", "main"]
    if here[0] in FRONTS:
        return there[0] in ORDER or here[0] == "cli"
    return {here[0], there[0]} <= {*ORDER} and ORDER.index(there[0]) < ORDER.index(here[0])


@pytest.mark.parametrize(
    ("importer", "imported", "answer"),
    [
        ("slipstream.batch", "slipstream.cache.spec", True),
        ("slipstream.cache.pages", "slipstream.batch", False),
        ("slipstream.cache.spec", "slipstream.cache.pages", False),
        ("slipstream.ops.linear.torch", "slipstream.checkpoint.tensors", False),
        ("slipstream.checkpoint.load", "slipstream.ops.linear", True),
        ("slipstream.llm", "slipstream.cli.main", False),
        ("slipstream.server.app", "slipstream.llm", True),
        ("slipstream.server.app", "slipstream.cli.main", False),
        ("slipstream.scheduler", "slipstream", False),
    ],
)
def test_the_rule_itself(importer: str, imported: str, answer: bool) -> None:
    assert allowed(importer, imported) is answer


def test_the_reader_sees_every_kind_of_import() -> None:
    source = (
        "import slipstream.llm, os\nfrom slipstream import scheduler\nfrom slipstream.cache.pages import Pages\n"
        "def f():\n    from . import storage\n    from ..errors import ConfigError\n"
    )
    found = {name for _, name in imports(SRC / "cache" / "spec.py", ast.parse(source))}
    assert found == {
        "slipstream.llm", "slipstream.scheduler", "slipstream.cache.pages", "slipstream.cache.storage",
        "slipstream.errors",
    }  # fmt: skip


def test_every_module_has_its_place() -> None:
    tops = {f.relative_to(SRC).parts[0].removesuffix(".py") for f in FILES} - {"__init__", "__main__"}
    assert tops <= {*ORDER, *FRONTS}, "give it a place in ORDER, and say why in docs/decisions/"


def test_imports_go_up_only() -> None:
    wrong = []
    for file in FILES:
        for line, name in imports(file, ast.parse(file.read_text())):
            if not allowed(name_of(file), name):
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", TORCH_FREE)
def test_no_torch(module: str) -> None:
    """One fresh process each, as one import must not hide another's."""
    code = f"import sys, {module}; sys.exit('it brings torch' if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "src", timeout=60)
    assert done.returncode == 0, f"{module}: {done.stderr}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SRC)))
def test_length(file: Path) -> None:
    lines = len(file.read_text().splitlines())
    limit, _ = LONGER.get(str(file.relative_to(SRC)), (MAX_LINES, ""))
    assert lines <= limit, f"{lines} lines; a file that grows is two nouns"


def test_exceptions_to_the_length_are_needed() -> None:
    for name in (n for n in LONGER if (SRC / n).is_file()):
        assert len((SRC / name).read_text().splitlines()) > MAX_LINES, f"take {name} out of LONGER"


def calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


# Processes of one launch, which run the same program, send each other objects as torch.distributed does.
BETWEEN_RANKS = {("parallel/steps.py", "pickle")}


def test_nothing_in_a_file_is_run() -> None:
    """No pickle, no torch.load, no eval or exec, no trust_remote_code: data from a checkpoint stays data."""
    banned_calls = {"eval", "exec", "compile", "__import__", "torch.load", "marshal.loads", "yaml.load"}
    banned_modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    wrong = []
    for file in FILES:
        tree = ast.parse(file.read_text())
        wrong += [f"{file}:{line} calls {name}" for line, name in calls(tree) if name in banned_calls]
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names = [n for n in names if (str(file.relative_to(SRC)), n) not in BETWEEN_RANKS]
            wrong += [f"{file}:{node.lineno} imports {n}" for n in names if n.split(".")[0] in banned_modules]
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                wrong.append(f"{file}:{node.value.lineno} passes trust_remote_code")
    assert not wrong, "\n".join(wrong)


def test_errors_are_not_swallowed() -> None:
    """`except Exception` and bare `except` only where a process ends. Those that raise again hide nothing."""
    wrong = []
    for file in FILES:
        if file.relative_to(SRC).parts[0] == "cli" or str(file.relative_to(SRC)) in CATCHES_ALL:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = "" if node.type is None else ast.unparse(node.type)
            names = set(caught.replace("(", " ").replace(")", " ").replace(",", " ").split())
            wide = node.type is None or names & {"Exception", "BaseException"}
            if wide and not any(isinstance(n, ast.Raise) for n in ast.walk(node)):
                wrong.append(f"{file}:{node.lineno} catches {caught or 'everything'}")
    assert not wrong, "\n".join(wrong)


def test_every_op_has_a_reference_that_stands_last() -> None:
    from importlib import import_module

    folders = [f.parent for f in (SRC / "ops").glob("*/__init__.py") if "IMPLS" in f.read_text()]
    assert len(folders) >= 8
    for folder in folders:
        assert (folder / "reference.py").is_file(), folder
        impls = import_module(f"slipstream.ops.{folder.name}").IMPLS
        last = impls[-1].load()  # it may be called what it is: torch
        assert getattr(last, "experts", last).__module__.endswith(".reference"), folder
        assert len({i.name for i in impls}) == len(impls), folder


def test_tests_mirror_src() -> None:
    """tests/<area>/ only for an area of src, so that a test is found where its subject is."""
    other = {"parity", "gpu", "fuzz"}
    areas = {d.name for d in (ROOT / "tests").iterdir() if d.is_dir() and any(d.rglob("test_*.py"))}
    tops = {f.relative_to(SRC).parts[0].removesuffix(".py") for f in FILES}
    assert areas <= tops | other


def test_modules_say_what_they_are_for() -> None:
    without = [f.relative_to(ROOT) for f in FILES if not ast.get_docstring(ast.parse(f.read_text()))]
    assert not without
