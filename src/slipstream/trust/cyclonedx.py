"""The audit as a CycloneDX 1.6 bill of materials, the format that scanners and procurement read."""

from __future__ import annotations

import platform
import sys
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from slipstream.trust.audit import Piece


def bill(pieces: Sequence[Piece], version: str) -> dict[str, Any]:
    """
    Args:
        version: of slipstream.
    """
    components = [_component(i, piece) for i, piece in enumerate(pieces)]
    root = {
        "type": "application", "bom-ref": "slipstream", "name": "slipstream", "version": version,
        "purl": f"pkg:pypi/slipstream@{quote(version)}",
        "properties": [
            {"name": "slipstream:python", "value": platform.python_version()},
            {"name": "slipstream:machine", "value": f"{platform.machine()}-{sys.platform}"},
        ],
    }  # fmt: skip
    refs = [c["bom-ref"] for c in components]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "lifecycles": [{"phase": "operations"}],
            "tools": {"components": [{"type": "application", "name": "slipstream", "version": version}]},
            "component": root,
        },
        "components": components,
        "dependencies": [{"ref": "slipstream", "dependsOn": refs}],
        # What was not mapped or imported when it was asked for is not in here.
        "compositions": [{"aggregate": "incomplete", "assemblies": ["slipstream"]}],
    }


def _component(number: int, piece: Piece) -> dict[str, Any]:
    properties = {"kind": piece.kind, "origin": piece.origin, "native": str(piece.native).lower(), **piece.details}
    properties["bytes"] = str(piece.size)
    if piece.matches is not None:
        properties["matches"] = str(piece.matches).lower()
    component: dict[str, Any] = {
        "type": "library" if piece.kind in ("hub", "foreign") else "file",
        "bom-ref": f"{piece.kind}-{number}",
        "name": piece.name,
        "properties": [{"name": f"slipstream:{k}", "value": v} for k, v in sorted(properties.items())],
        "evidence": {"occurrences": [{"location": piece.path}]},
    }
    if piece.version:
        component["version"] = piece.version
    if piece.sha256:
        component["hashes"] = [{"alg": "SHA-256", "content": piece.sha256}]
    if purl := _purl(piece):
        component["purl"] = purl
    return component


def _purl(piece: Piece) -> str | None:
    """A package URL where the piece comes from a registry that has them."""
    if piece.kind in ("hub", "foreign") and "@" in piece.origin and not Path(piece.name).is_absolute():
        repo, _, commit = piece.origin.rpartition("@")
        return f"pkg:huggingface/{quote(repo)}@{commit}"
    if piece.kind == "package":
        name = piece.origin.rpartition(" ")[0].lower().replace("_", "-")
        return f"pkg:pypi/{quote(name)}@{quote(piece.version or '')}#{quote(piece.name)}"
    return None
