"""C sources compiled on first use by the compiler that is there, and kept in the cache; without one, other
implementations take their place. Nothing is downloaded: the sources are the files beside this one."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from slipstream.config.paths import cache_root
from slipstream.errors import KernelError, TrustError

# What -ffast-math would bring and we need, without its start-up code, which switches denormals off for the process.
FAST = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno", "-ffp-contract=fast")
# The compiler may sum and round only as the source is written, so that every copy that it makes of a function for some
# number of tokens, with its loops unrolled or not, gives the same bits.
STRICT = ("-fno-math-errno", "-ffp-contract=off")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-std=gnu11")


@functools.cache
def build(name: str, strict: bool = False) -> ctypes.CDLL | str:
    """The library made from `name`.c, or a sentence that says why there is none.

    Args:
        strict: sums are in the order of the source, for results that must be the same to the last bit.
    """
    flags = FLAGS + (STRICT if strict else FAST)
    words = shlex.split(os.environ.get("CC") or "cc")
    compiler = shutil.which(words[0])
    if compiler is None:
        return f"there is no C compiler ({words[0]}) on this machine"
    source = Path(__file__).with_name(f"{name}.c")
    try:
        parts = [f.read_bytes() for f in (source, *sorted(source.parent.glob("*.h")))]
        parts.append(repr((flags, compiler, words[1:], _processor())).encode())
        key = hashlib.sha256(b"".join(parts)).hexdigest()[:24]
    except OSError as e:
        return f"{source} cannot be read: {e}"
    path = cache_root() / "native" / f"{name}-{key}.so"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                made = Path(scratch) / path.name
                command = [compiler, *words[1:], *flags, str(source), "-o", str(made), "-lm"]
                done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
                if done.returncode:
                    lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
                    return f"{compiler} could not compile {source.name}: {lines[0][:200]}"
                os.replace(made, path)
        _check_owner(path.parent)
        _check_owner(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"{source.name} could not be compiled or loaded: {e}"


def missing(name: str, strict: bool = False) -> str | None:
    """Why there is no such library here; None where there is one."""
    library = build(name, strict)
    return library if isinstance(library, str) else None


def load(name: str, strict: bool = False) -> ctypes.CDLL:
    """The library.

    Raises:
        KernelError: there is none; says why.
    """
    library = build(name, strict)
    if isinstance(library, str):
        raise KernelError(f"{name}.c: {library}")
    return library


def _check_owner(path: Path) -> None:
    """Native code is only run from where nobody else can have put it."""
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise TrustError(
            f"{path} could have been written by another user, so it is not run; set SLIPSTREAM_HOME to a folder of your own "
            f"or take the rights away: chmod go-w {path}"
        )


def _processor() -> str:
    """Which instructions there are: a cache shared between machines must not mix them up."""
    try:
        with open("/proc/cpuinfo") as f:
            return next((line for line in f if line.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.processor() + platform.machine()
