"""Under which name Triton keeps a compiled kernel: it has to be the same in every process, or the next one compiles it again."""

from __future__ import annotations

import importlib
import pkgutil
from itertools import pairwise

import pytest

pytest.importorskip("triton")

from triton.runtime.jit import JITCallable

import slipstream.ops as ops


def functions() -> list[JITCallable]:
    found: dict[int, JITCallable] = {}
    for info in pkgutil.walk_packages(ops.__path__, "slipstream.ops."):
        module = importlib.import_module(info.name)
        found |= {
            id(v): v for v in vars(module).values() if isinstance(v, JITCallable) and "slipstream" in v.fn.__module__
        }
    return list(found.values())


def test_a_kernel_has_one_name_whichever_was_first() -> None:
    """Triton 3.6 counts a number that a helper finds outside of itself only if the helper had a name before its kernel asked."""
    all = functions()
    assert len(all) > 40
    before = [(f.hash, f.used_global_vals) for f in all]
    names = []
    try:
        for order in (all, all[::-1], all[1::2] + all[::2]):
            for f in all:
                f.hash, f.used_global_vals = None, {}
            made = {id(f): f.cache_key for f in order}
            names.append([made[id(f)] for f in all])
    finally:
        for f, (hash, values) in zip(all, before, strict=True):
            f.hash, f.used_global_vals = hash, values
    for one, other in pairwise(names):
        assert [f.__name__ for f, a, b in zip(all, one, other, strict=True) if a != b] == []
