"""The report of code in the process, and that its CycloneDX form is what the specification demands."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slipstream.trust import audit
from slipstream.trust.audit import Piece
from slipstream.trust.cyclonedx import bill
from tests.trust.world import World

TYPES = {
    "application", "framework", "library", "container", "platform", "operating-system", "device", "device-driver",
    "firmware", "file", "machine-learning-model", "data", "cryptographic-asset",
}  # fmt: skip


def lists(path: Path, content: bytes, stated: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `wheelhouse` 2.5 whose list of files has the hash of `stated`, and whose library holds `content`."""
    library = path / "wheelhouse" / "_fast.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(content)
    info = path / "wheelhouse-2.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wheelhouse\nVersion: 2.5\n")
    value = base64.urlsafe_b64encode(hashlib.sha256(stated).digest()).rstrip(b"=").decode()
    (info / "RECORD").write_text(f"wheelhouse/_fast.so,sha256={value},{len(stated)}\n")
    monkeypatch.syspath_prepend(str(path))
    return library


def mapped(path: Path, *files: Path) -> Path:
    lines = [f"7f00-7f01 r-xp 00000000 08:01 {i + 5}    {f}\n" for i, f in enumerate(files)]
    lines += [f"7f02-7f03 rw-p 00000000 08:01 5    {files[0]}\n", "7ffe-7fff r-xp 00000000 00:00 0    [vdso]\n"]
    lines += ["7f04-7f05 r--p 00000000 08:01 77    /weights/model.safetensors\n", "7f06-7f07 rwxp 00000000 00:00 0 \n"]
    maps = path / "maps"
    maps.write_text("".join(lines))
    return maps


@pytest.mark.parametrize("changed", [False, True])
def test_libraries_and_what_their_package_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:  # fmt: skip
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "home"))
    library = lists(tmp_path / "site", b"real" + b"!" * changed, b"real", monkeypatch)
    built = tmp_path / "home" / "native" / "dense-1.so"
    built.parent.mkdir(parents=True)
    built.write_bytes(b"ours")
    foreign = tmp_path / "name with spaces.so.6"
    foreign.write_bytes(b"theirs!")
    monkeypatch.setattr(audit, "MAPS", mapped(tmp_path, library, built, foreign))
    found = {p.name: p for p in audit.audit() if p.kind in ("package", "compiled", "system")}
    assert found.keys() == {"_fast.so", "dense-1.so", foreign.name}
    assert found["_fast.so"].origin == "wheelhouse 2.5" and found["_fast.so"].matches is not changed
    assert found["dense-1.so"].kind == "compiled" and found["dense-1.so"].matches is None
    assert (found[foreign.name].size, found[foreign.name].kind) == (7, "system")
    assert all(p.sha256 == hashlib.sha256(Path(p.path).read_bytes()).hexdigest() for p in found.values())


def test_a_library_that_is_gone_has_no_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "MAPS", mapped(tmp_path, tmp_path / "was here.so (deleted)"))
    (piece,) = [p for p in audit.audit() if p.kind == "system"]
    assert piece.sha256 == "" and piece.path.endswith("(deleted)")
    assert "hashes" not in bill([piece], "1")["components"][0]


def test_machine_code_of_triton_is_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from slipstream.ops.norm import triton as norm

    monkeypatch.setattr(audit, "MAPS", tmp_path / "no such file")
    compiled = SimpleNamespace(asm={"cubin": b"ELF", "ptx": "text"})
    monkeypatch.setattr(norm._add_norm, "device_caches", {0: ({"key": compiled}, {}, None, None, None)})
    (piece,) = [p for p in audit.audit() if p.name == "slipstream.ops.norm.triton"]
    assert piece.details["kernels"].split(", ")[0] == "_add_norm" and not piece.native
    assert piece.details["binaries"] == f"_add_norm {hashlib.sha256(compiled.asm['cubin']).hexdigest()}"
    assert piece.sha256 == hashlib.sha256(Path(norm.__file__ or "").read_bytes()).hexdigest()


def test_kernels_of_ours_and_of_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel whose files were changed after it was imported, and one that the kernels library imported under no policy."""
    import kernels
    from huggingface_hub import constants

    from slipstream.ops.hub import open_kernel

    monkeypatch.setattr(audit, "MAPS", world.folder / "no such file")
    commit = world.publish("acme/scale")
    pin = world.pin("acme/scale")
    found = open_kernel("acme/scale", "cpu", world.policy(pin))
    theirs = kernels.get_local_kernel(world.local("theirs", gain=9))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pieces = {p.kind: p for p in audit.audit() if p.kind in ("hub", "foreign")}
    assert pieces["hub"].matches and pieces["hub"].sha256 == found.sha256 and commit in pieces["hub"].origin
    assert pieces["hub"].size == pin.builds["torch-cpu"].size
    assert pieces["foreign"].path == str(Path(theirs.__file__).parent) and pieces["foreign"].matches is None
    (found.where / "table.bin").unlink()
    assert [p.matches for p in audit.audit() if p.kind == "hub"] == [False]


PIECES = [
    Piece("hub", "acme/scale", "/c/ab", "ab" * 32, 10, "acme/scale@" + "c" * 40, "3", True, True, {"variant": "torch-cpu"}),
    Piece("hub", "/opt/kernels/x", "/c/cd", "cd" * 32, 11, "/opt/kernels/x", None, False, True, {}),
    Piece("package", "libtorch.so", "/v/libtorch.so", "ef" * 32, 12, "torch_extra 2.13.0+cpu", "2.13.0+cpu", True, False),
    Piece("system", "libc.so.6", "/lib/libc.so.6", "", 0, "the system"),
]  # fmt: skip


def test_cyclonedx_has_what_the_specification_demands() -> None:
    """Of CycloneDX 1.6: which fields are required, their patterns and lists of values."""
    bom = bill(PIECES, "0.9.1")
    assert (bom["bomFormat"], bom["specVersion"], bom["version"]) == ("CycloneDX", "1.6", 1)
    uuid = r"^urn:uuid:[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
    assert re.match(uuid, bom["serialNumber"]) and bom["serialNumber"] != bill(PIECES, "0.9.1")["serialNumber"]
    assert datetime.fromisoformat(bom["metadata"]["timestamp"]).tzinfo is not None
    components = [bom["metadata"]["component"], *bom["metadata"]["tools"]["components"], *bom["components"]]
    for component in components:
        assert component["type"] in TYPES and component["name"]
        assert all(
            h["alg"] == "SHA-256" and re.fullmatch("[0-9a-f]{64}", h["content"]) for h in component.get("hashes", [])
        )
        assert all(isinstance(p["name"], str) and isinstance(p["value"], str) for p in component.get("properties", []))
    refs = [c["bom-ref"] for c in components if "bom-ref" in c]
    assert len(refs) == len(set(refs)) == len(PIECES) + 1
    (dependency,) = bom["dependencies"]
    assert {dependency["ref"], *dependency["dependsOn"]} == set(refs)
    assert [c.get("purl") for c in bom["components"]] == [
        "pkg:huggingface/acme/scale@" + "c" * 40, None, "pkg:pypi/torch-extra@2.13.0%2Bcpu#libtorch.so", None,
    ]  # fmt: skip
    properties = {p["name"]: p["value"] for p in bom["components"][2]["properties"]}
    assert properties["slipstream:matches"] == "false" and properties["slipstream:bytes"] == "12"


def test_cyclonedx_fits_the_official_schema(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the package with the schema is installed: pip install 'cyclonedx-python-lib[json-validation]'."""
    validation: Any = pytest.importorskip("cyclonedx.validation.json")
    pytest.importorskip("jsonschema")
    from cyclonedx.schema import SchemaVersion

    validator = validation.JsonStrictValidator(SchemaVersion.V1_6)
    for pieces in ([], PIECES, audit.audit()):
        assert (error := validator.validate_str(json.dumps(bill(pieces, "0.9.1")))) is None, error
    broken = bill(PIECES, "0.9.1") | {"serialNumber": "7"}
    assert validator.validate_str(json.dumps(broken)) is not None
