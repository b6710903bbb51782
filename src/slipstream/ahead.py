"""Shorten the way to the first token: start early what needs no interpreter, put off what can wait."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path


def read_torch() -> None:
    """Let a thread bring torch's largest library into memory, so that `import torch` waits less.

    dlopen is called through ctypes, which gives up the interpreter's lock for the call; `ctypes.CDLL(path)` keeps it.
    The loader's own lock is held, so imports of other native modules wait: call this after them. A failure is left for
    `import torch` to tell.
    """
    if "torch" in sys.modules:
        return
    # Only the devices named in EngineConfig are used; packages that bring others need not be searched for, nor run.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None or not sys.platform.startswith("linux"):
        return
    library = Path(spec.origin).with_name("lib") / "libtorch_cpu.so"
    if library.exists():
        dlopen = ctypes.CDLL(None).dlopen
        dlopen.argtypes, dlopen.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
        threading.Thread(target=dlopen, args=(os.fsencode(library), os.RTLD_NOW), daemon=True).start()


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """While a million objects are made, none of them garbage, do not look for garbage among them."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
