"""Opening what is pinned: from the Hub, from a folder, without a network; and kernels that cannot run here."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import ModuleType

import pytest

from slipstream.errors import KernelError, TrustError
from slipstream.trust import Policy
from tests.trust.world import VARIANT, World

REPO = "acme/scale"


def open_kernel(name: str, policy: Policy):  # type: ignore[no-untyped-def]
    from slipstream.ops.hub import open_kernel

    return open_kernel(name, "cpu", policy)


def test_hub_then_offline(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from slipstream.ops.hub import opened
    from slipstream.trust.imports import forget, packages

    commit = world.publish(REPO, gain=6, signed=True)
    policy = world.policy(world.pin(REPO))
    found = open_kernel(f"{REPO}:Doubled", policy)
    assert (found.repo, found.revision, found.variant, found.version) == (REPO, commit, VARIANT, 1)
    assert found.module.scale(7) == 42 and found.layer.factor == 2
    assert [o.sha256 for o in opened()] == [found.sha256]
    assert found.signer == "https://github.com/acme/kernels/.github/workflows/build.yaml@refs/heads/main"
    forget(packages()[0])
    asked = len(world.hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_kernel(REPO, policy).module.scale(7) == 42
    assert len(world.hub.asked) == asked


def test_folder(world: World) -> None:
    folder = world.local(gain=4)
    policy = world.policy(world.pin_local(folder))
    found = open_kernel(str(folder), policy)
    assert found.revision is None and found.module.scale(5) == 20 and found.repo == str(folder)
    assert open_kernel(f"../{folder.relative_to(world.folder)}:Doubled", policy).layer.factor == 2
    assert not world.hub.asked


def test_twice_is_once_and_two_versions_are_two(world: World) -> None:
    world.publish(REPO, gain=3)
    first = world.pin(REPO)
    world.publish(REPO, version=2, gain=5)
    second = world.pin(REPO)
    old = open_kernel(REPO, world.policy(first)).module
    world.canary.unlink()
    assert open_kernel(REPO, world.policy(first)).module is old and not world.canary.exists()
    new = open_kernel(REPO, world.policy(second)).module
    assert (old.scale(2), new.scale(2)) == (6, 10)


def test_a_mirror_that_is_away_is_said_at_once(world: World) -> None:
    world.publish(REPO)
    pin = world.pin(REPO)
    text = world.policy_text().replace(world.hub.url, "http://127.0.0.1:9")
    begun = time.monotonic()
    with pytest.raises(TrustError, match=r"http://127.0.0.1:9 cannot be reached: .*; check the network"):
        open_kernel(REPO, world.policy(pin, text=text))
    assert time.monotonic() - begun < 10


def test_no_build_for_this_machine(world: World) -> None:
    world.publish(REPO, variant="torch29-cxx11-cu128-aarch64-linux")
    with pytest.raises(KernelError, match="no build for cpu on this machine: .*aarch64") as caught:
        open_kernel(REPO, world.policy(world.pin(REPO)))
    assert [name for name, _ in caught.value.rejected] == ["torch29-cxx11-cu128-aarch64-linux"]
    world.publish(REPO, version=2, variant="something-else")
    with pytest.raises(KernelError, match="not one that the kernels library knows"):
        open_kernel(REPO, world.policy(world.pin(REPO)))


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("x = 1 / 0", "ZeroDivisionError"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("from . import part\nraise RuntimeError('two\\nlines')", "RuntimeError: two"),
    ],
)
def test_broken_at_import(world: World, source: str, cause: str) -> None:
    before = set(sys.modules)
    world.publish(REPO, files={"__init__.py": source.encode(), "part.py": b""})
    with pytest.raises(KernelError, match=f"importing it failed: {cause}"):
        open_kernel(REPO, world.policy(world.pin(REPO)))
    assert not [m for m in set(sys.modules) - before if m.startswith("_kernel_")]


def test_no_module_and_no_layer(world: World) -> None:
    world.publish(REPO, files={"other.py": b""})
    with pytest.raises(KernelError, match="has no __init__.py"):
        open_kernel(REPO, world.policy(world.pin(REPO)))
    world.publish(REPO, version=2)
    with pytest.raises(KernelError, match="has no layer Tripled"):
        open_kernel(f"{REPO}:Tripled", world.policy(world.pin(REPO)))


def test_bytecode_is_neither_written_nor_read(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)  # it is not because all of Python was told so
    world.publish(REPO)
    found = open_kernel(REPO, world.policy(world.pin(REPO)))
    assert not list(found.where.rglob("*.pyc")) and not list(found.where.rglob("__pycache__"))
    assert getattr(found.module, "__cached__", None) is None or not Path(found.module.__cached__).exists()


def test_no_time_between_check_and_use(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the hash and the import somebody writes over every file: what was hashed is executed all the same."""
    from slipstream.ops import hub
    from slipstream.trust.imports import VerifiedPackage, import_verified

    def race(package: VerifiedPackage) -> object:
        for path in (world.home / "kernels").rglob("*.py"):
            path.chmod(0o644)
            path.write_text(f"from pathlib import Path\nPath({str(world.canary)!r}).write_text('evil')\n")
        return import_verified(package)

    monkeypatch.setattr(hub, "import_verified", race)
    world.publish(REPO, gain=3)
    found = open_kernel(REPO, world.policy(world.pin(REPO)))
    assert world.canary.read_text() == "ran" and found.module.scale(2) == 6


def test_what_is_added_later_is_not_found(world: World) -> None:
    from importlib import import_module

    world.publish(REPO)
    found = open_kernel(REPO, world.policy(world.pin(REPO)))
    (found.where / "late.py").write_text("raise SystemExit")
    with pytest.raises(ModuleNotFoundError, match="not among the pinned files"):
        import_module(f"{found.module.__name__}.late")
    assert import_module(f"{found.module.__name__}.parts.gain").GAIN == 3


def test_what_was_put_under_its_name_is_not_it(world: World) -> None:
    world.publish(REPO, gain=3)
    pin = world.pin(REPO)
    name = f"_kernel_tiny_scale_{pin.builds[VARIANT].sha256[:16]}"
    for planted in (name, f"{name}.layers"):
        sys.modules[planted] = ModuleType(planted)
    found = open_kernel(f"{REPO}:Doubled", world.policy(pin))
    assert found.module.__name__ == name and found.module.scale(2) == 6 and found.layer.factor == 2


def test_a_signed_folder_by_a_listed_signer(world: World) -> None:
    folder = world.local(signed=True, gain=5)
    pin = world.pin_local(folder)
    signed_for = world.policy_text("require_signatures = true").replace('repos = ["acme/*"]\n', "repos = [{}]\n")
    signed_for = 'repos = ["acme/*"]\n' + signed_for.split("\n", 1)[1]
    for wrong in ('"acme/*"', '"/opt/kernels"', f'"{folder}x"'):
        with pytest.raises(TrustError, match="does not list as a signer for"):
            open_kernel(str(folder), world.policy(pin, text=signed_for.replace("{}", wrong)))
    assert not world.canary.exists()
    for right in (f'"{folder}"', f'"a/b", "{folder.parent}"'):
        found = open_kernel(str(folder), world.policy(pin, text=signed_for.replace("{}", right)))
        assert found.module.scale(2) == 10 and str(found.signer).startswith("https://github.com/acme/kernels/")


def test_a_link_to_the_store_cannot_be_turned_elsewhere(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The link lies where others can write; what it led to when it was checked is what is used."""
    world.publish(REPO)
    (world.folder / "open").mkdir()
    (world.folder / "open").chmod(0o777)
    (world.folder / "open" / "home").symlink_to(world.home)
    monkeypatch.setenv("SLIPSTREAM_HOME", str(world.folder / "open" / "home"))
    assert open_kernel(REPO, world.policy(world.pin(REPO))).where.is_relative_to(world.home)


def test_machine_code_and_data(world: World) -> None:
    include = Path(sysconfig.get_path("include"))
    if shutil.which("cc") is None or not (include / "Python.h").exists():
        pytest.skip("no C compiler, or no headers of Python")
    source = world.folder / "ops.c"
    source.write_text(
        "#include <Python.h>\nstatic struct PyModuleDef d = {PyModuleDef_HEAD_INIT, \"_ops\", 0, -1, 0};\n"
        'PyMODINIT_FUNC PyInit__ops(void) { PyObject *m = PyModule_Create(&d); PyModule_AddIntConstant(m, "forty", 40); '
        "return m; }\n"
    )  # fmt: skip
    made = world.folder / "_ops.abi3.so"
    subprocess.run(["cc", "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(made)], check=True, timeout=60)
    init = b"from pathlib import Path\nfrom .native._ops import forty\ntable = (Path(__file__).parent / 'table.bin').read_bytes()\n"
    files = {"__init__.py": init, "native/_ops.abi3.so": made.read_bytes(), "table.bin": b"\1\2"}
    world.publish(REPO, files=files)
    pin = world.pin(REPO)
    assert pin.builds[VARIANT].is_native
    found = open_kernel(REPO, world.policy(pin)).module
    assert found.forty + found.table[1] == 42
    assert str(world.home / "kernels") in Path("/proc/self/maps").read_text()


def test_triton_reads_its_sources(world: World) -> None:
    """Triton takes a kernel's text through inspect, which must find it though it was executed from memory."""
    pytest.importorskip("triton")
    from slipstream.trust.audit import audit

    code = b"import triton\n\n@triton.jit\ndef twice(x):\n    return x + x\n\ndef plain():\n    return 5\n"
    world.publish(REPO, files={"__init__.py": b"from .code import plain, twice\n", "code.py": code})
    module = open_kernel(REPO, world.policy(world.pin(REPO))).module
    assert inspect.getsource(module.plain) == "def plain():\n    return 5\n"
    assert "return x + x" in module.twice.src
    pieces = audit()
    assert [p.details["kernels"] for p in pieces if p.kind == "triton" and p.name.endswith(".code")] == ["twice"]
    (hub,) = [p for p in pieces if p.kind == "hub"]
    assert hub.name == REPO and hub.origin == f"{REPO}@{world.hub.branches[REPO]['v1']}" and not hub.native


def test_without_the_extra(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.publish(REPO)
    policy = world.policy(world.pin(REPO))
    monkeypatch.setattr("slipstream.ops.hub.find_spec", lambda name: None)
    with pytest.raises(KernelError, match=r"pip install 'slipstream\[kernels\]'"):
        open_kernel(REPO, policy)


def test_nothing_is_allowed_by_default(world: World) -> None:
    world.publish(REPO)
    for policy in (Policy(), Policy.find()):
        with pytest.raises(TrustError, match=f"{REPO}: .*slipstream kernels lock {REPO}"):
            open_kernel(REPO, policy)
    assert Policy().why_not(REPO) and not world.hub.asked
