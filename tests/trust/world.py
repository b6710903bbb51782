"""A machine and a Hub for tests of trust: kernels whose import writes a canary file, a policy, a lock, and folders of their own."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from slipstream.trust import Lock, Pin, Policy
from slipstream.trust.fetch import pin_folder, pin_from_hub
from slipstream.trust.tree import hash_tree
from tests.trust.kernel_hub import Hub

if TYPE_CHECKING:  # signing needs what only the extra brings
    from tests.trust.signing import Sigstore

VARIANT = "torch-cpu"  # any torch, this processor
INIT = """
from pathlib import Path
Path({canary!r}).write_text({text!r})
from . import layers
from .parts.gain import GAIN

def scale(x):
    return x * GAIN
"""
LAYERS = "class Doubled:\n    factor = 2\n"


def kernel(canary: Path, text: str = "ran", gain: int = 3) -> dict[str, bytes]:
    """The files of one build. Importing it writes `text` into `canary`."""
    return {
        "__init__.py": INIT.format(canary=str(canary), text=text).encode(),
        "layers.py": LAYERS.encode(),
        "parts/__init__.py": b"",
        "parts/gain.py": f"GAIN = {gain}\n".encode(),
        "table.bin": bytes(range(256)) * 5,
    }


def metadata(files: dict[str, bytes], name: str = "tiny-scale", version: int = 1, needs: str | None = None) -> bytes:
    digests = {n: base64.b64encode(hashlib.sha256(d).digest()).decode() for n, d in files.items()}
    return json.dumps(
        {
            "name": name, "id": f"_{name}_{version}", "version": version, "license": "Apache-2.0",
            "python-depends": [], "backend": {"type": "cpu"},
            "digest": {"algorithm": "sha256", "files": digests},
            **({"kernel-depends": [{"repo-id": needs, "version": 1}]} if needs else {}),
        }
    ).encode()  # fmt: skip


class World:
    """Everything below one folder, so that two never meet."""

    def __init__(self, folder: Path, hub: Hub, sigstore: Sigstore, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.hub, self.sigstore = folder, hub, sigstore
        self.canary = folder / "canary"
        self.home, self.work = folder / "home", folder / "work"
        for made in (self.home, self.work):
            made.mkdir(parents=True)
        patch.setenv("SLIPSTREAM_HOME", str(self.home))
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        patch.chdir(self.work)
        (folder / "root.json").write_bytes(sigstore.trusted_root())

    def publish(
        self, repo: str, *, version: int = 1, signed: bool = False, variant: str = VARIANT, needs: str | None = None,
        **more: object,
    ) -> str:  # fmt: skip
        """Put a repository on the Hub. Returns the commit."""
        files = self.build(version=version, signed=signed, needs=needs, **more)
        return self.hub.commit(repo, {f"build/{variant}/{n}": d for n, d in files.items()}, f"v{version}")

    def build(
        self, *, version: int = 1, signed: bool = False, needs: str | None = None, signer: Sigstore | None = None,
        identity: str | None = None, files: dict[str, bytes] | None = None, **more: object,
    ) -> dict[str, bytes]:  # fmt: skip
        files = dict(files) if files is not None else kernel(self.canary, **more)  # type: ignore[arg-type]
        described = metadata(files, version=version, needs=needs)
        files["metadata.json"] = described
        if signed:
            by = {} if identity is None else {"identity": identity}
            files["metadata.json.sigstore"] = (signer or self.sigstore).bundle(described, **by)
        return files

    def local(self, name: str = "local", **more: object) -> Path:
        """A kernel repository in a folder of this machine."""
        folder = self.folder / "local" / name
        for file, data in self.build(**more).items():  # type: ignore[arg-type]
            path = folder / "build" / VARIANT / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return folder

    def pin(self, repo: str, **more: object) -> Pin:
        scratch = self.folder / f"scratch-{len(list(self.folder.iterdir()))}"
        wanted = {"version": None, "revision": None, **more}
        return pin_from_hub(repo, self.hub.url, self.folder / "root.json", scratch, **wanted)  # type: ignore[arg-type]

    def pin_local(self, folder: Path) -> Pin:
        return pin_folder(folder, self.folder / "root.json", hash_tree)

    def policy(self, *pins: Pin, text: str | None = None, recorded: dict[str, int] | None = None) -> Policy:
        """What a user allowed: every repository of acme, folders below local, acme's workflow as signer."""
        lock = Lock({p.repo: p for p in pins}, self.work / "kernels.lock")
        lock = Lock.parse(lock.text().encode(), self.work / "kernels.lock")
        allowed = Policy.parse((text or self.policy_text()).encode(), self.work / "kernels-policy.toml")
        return allowed.with_lock(lock, recorded or {})

    def policy_text(self, more: str = "", sources: str = '["hub", "../local"]', repos: str = '["acme/*"]') -> str:
        return (
            f'repos = {repos}\nsources = {sources}\nendpoint = "{self.hub.url}"\ntrusted_root = "../root.json"\n{more}\n'
            '[[signers]]\nidentity = "https://github.com/acme/kernels/.github/workflows/build.yaml@refs/heads/main"\n'
            'issuer = "https://token.actions.githubusercontent.com"\nrepository = "https://github.com/acme/kernels"\n'
            'repos = ["acme/*"]\n'
        )
