"""Start what takes long and needs no interpreter, while Python is busy with something else."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import sys
import threading
from pathlib import Path


def read_torch() -> None:
    """Let a thread bring torch's libraries into memory, so that `import torch` waits less. Once; harmless anywhere."""
    if "torch" in sys.modules or any(t.name == "read-torch" for t in threading.enumerate()):
        return
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return
    library = Path(spec.origin).with_name("lib") / "libtorch_python.so"
    if library.exists():
        threading.Thread(target=_open, args=(str(library),), name="read-torch", daemon=True).start()


def _open(library: str) -> None:
    with contextlib.suppress(OSError):  # `import torch` will say what is wrong with it
        ctypes.CDLL(library)
