"""Kernels of the Hugging Face Hub and of folders: resolved with the `kernels` library, verified here, and only then imported.

The only file that imports `kernels`. Of that library it uses which build fits a machine and what metadata.json means; not how it
downloads, checks or imports, as that trusts the cache, the environment and bytecode. docs/security.md says what is checked when.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from slipstream.config.paths import cache_root
from slipstream.errors import KernelError, TrustError
from slipstream.trust import Build, Pin, Policy, tree
from slipstream.trust.fetch import Store, build_folder, download
from slipstream.trust.imports import VerifiedPackage, forget, import_verified, packages
from slipstream.trust.policy import refusal, split_layer
from slipstream.trust.signature import BUNDLE, METADATA, check_signer, identity_of, signed_by

# What of the environment would put other code in the place of a pinned kernel, or the same by another program's hand.
_OVERRIDES = {
    "LOCAL_KERNELS": "puts folders in the place of kernels",
    "KERNELS_CACHE": "names a cache that is not verified",
    "TRITON_KERNEL_OVERRIDE": "puts files in the place of what Triton compiles",
    "TRITON_OVERRIDE_DIR": "puts files in the place of what Triton compiles",
}


@dataclass(frozen=True, slots=True)
class Opened:
    """A kernel that was verified and imported. `layer` is the class asked for with `org/repo:Layer`, else None."""

    module: ModuleType
    repo: str
    revision: str | None
    variant: str
    sha256: str  # of the tree
    where: Path  # the verified files that it was imported from
    layer: Any = None
    version: int | None = None
    signer: str | None = None


def open_kernel(name: str, device: str, policy: Policy) -> Opened:
    """Verify and import `org/repo`, `org/repo:Layer`, or a folder that the lock lists (`/path` or `./path`, `:Layer` too).

    Every byte is compared each time. Opening the same bytes twice gives the same module.

    Args:
        device: cpu, cuda or mps; a build variant for it is looked for.

    Raises:
        TrustError: it is not allowed, not pinned, not equal to what was pinned, or cannot be had to compare.
        KernelError: nothing is wrong with it, but it cannot run: no build for this machine, or importing it failed; or the
            extra `kernels` is not installed.
    """
    pin = policy.pinned(name)
    needed = {repo: open_kernel(repo, device, policy).module for repo in pin.depends}
    try:
        check_environment()
        build = build_for(pin, device)
        where, texts, signer = verified(pin, build, policy)
        found = _already(pin, build) or _import(pin, build, where, texts, needed, signer)
    except TrustError as e:
        raise refusal(pin.repo, str(e)) from e
    layer = split_layer(name)[1]
    return replace(found, layer=_layer(found.module, pin.repo, layer)) if layer else found


def opened() -> list[Opened]:
    """The kernels that this process has imported, for `audit` and `explain --used`."""
    return [package.tag for package in packages() if isinstance(package.tag, Opened)]


def check_environment() -> None:
    """
    Raises:
        TrustError: a variable is set that would change what is loaded.
    """
    for name, what in _OVERRIDES.items():
        if os.environ.get(name, "") not in ("", "0"):
            raise TrustError(f"{name} is set in the environment, which {what}; unset it: unset {name}")


def build_for(pin: Pin, device: str) -> Build:
    """The build that fits this machine, its torch and `device`.

    Raises:
        KernelError: none does; says why of each.
    """
    if find_spec("kernels") is None:
        raise KernelError(f"{pin.repo}: kernels from the Hub need an extra: pip install 'slipstream[kernels]'")
    from kernels.variants import VariantAccepted, VariantRejected, parse_variant, resolve_variants

    backend = {"cuda": None, "mps": "metal"}.get(device.partition(":")[0], "cpu")
    known, rejected = [], []
    for variant in pin.builds:
        try:
            known.append(parse_variant(variant))
        except ValueError:
            rejected.append((variant, "its name is not one that the kernels library knows"))
    try:
        _, trace = resolve_variants(known, backend)
    except ValueError as e:  # torch here is not for that device at all
        raise KernelError(f"{pin.repo}: {e}") from e
    for decision in trace:
        variant = decision.variant.variant_str
        if isinstance(decision, VariantAccepted) and variant in pin.builds:
            return pin.builds[variant]
        if isinstance(decision, VariantRejected):
            rejected.append((variant, decision.reason))
    why = "; ".join(f"{variant}: {reason}" for variant, reason in rejected)
    raise KernelError(f"{pin.repo} has no build for {device} on this machine: {why}", rejected=tuple(rejected))


def store() -> Store:
    """With no link on the way to it, which somebody could turn elsewhere after a check."""
    return Store((cache_root() / "kernels").resolve())


def verified(pin: Pin, build: Build, policy: Policy) -> tuple[Path, dict[str, bytes], str | None]:
    """The build's folder, fetched if need be, with every byte compared; its Python and metadata as they were read; and who signed it.

    Raises:
        TrustError: any difference, or a signature that the policy asks for is missing, invalid or of somebody else.
    """
    kept = store()
    where = kept.path(build)
    if pin.is_local:
        _from_folder(pin, build, kept)
    elif not where.exists():
        with kept.scratch() as scratch:
            names = [f"build/{build.variant}/{name}" for name in build.files]
            assert pin.revision is not None
            download(pin.repo, pin.revision, names, policy.endpoint, scratch)
            tree.verify(scratch / "build" / build.variant, build, scratch / "verified")
            kept.keep(scratch / "verified", build)
    tree.check_private(where)
    try:
        texts = tree.verify(where, build)
    except TrustError as e:
        raise TrustError(f"{e} (in {where}; remove that folder to fetch it again)") from e
    return where, texts, _signer(pin, build, texts, policy)


def _from_folder(pin: Pin, build: Build, kept: Store) -> None:
    """Copy a build of a folder, as its owner may change it at any time. The folder must be what was pinned each time."""
    source = build_folder(pin, build)
    if source.resolve() != source:
        raise TrustError(f"{source} is reached through a symbolic link, and may be anything")
    if kept.path(build).exists():
        tree.verify(source, build)
        return
    with kept.scratch() as scratch:
        tree.verify(source, build, scratch / "verified")
        kept.keep(scratch / "verified", build)


def _signer(pin: Pin, build: Build, texts: dict[str, bytes], policy: Policy) -> str | None:
    if BUNDLE not in texts:
        if policy.require_signatures:
            raise TrustError(f"it is not signed, and {policy.path} requires signatures")
        return None
    certificate = signed_by(texts[METADATA], texts[BUNDLE], build.files, policy.trusted_root)
    check_signer(certificate, pin.repo, policy.signers)
    return identity_of(certificate)[0]


def _already(pin: Pin, build: Build) -> Opened | None:
    return next((o for o in opened() if (o.repo, o.sha256) == (pin.repo, build.sha256)), None)


def _import(
    pin: Pin, build: Build, where: Path, texts: dict[str, bytes], needed: dict[str, ModuleType], signer: str | None
) -> Opened:
    from kernels.deps import use_kernel_deps

    name = _check_metadata(pin, build, texts)
    root = "" if "__init__.py" in texts else f"{name}/"
    sources = {n.removeprefix(root): d for n, d in texts.items() if n.endswith(".py") and n.startswith(root)}
    if "__init__.py" not in sources:
        raise KernelError(f"{pin.repo}: {build.variant} has no __init__.py to import")
    others = frozenset(n.removeprefix(root) for n in build.files if not n.endswith(".py") and n.startswith(root))
    package = VerifiedPackage(f"_kernel_{name}_{build.sha256[:16]}", where / root, sources, others, None)
    try:
        with use_kernel_deps(needed):
            module = import_verified(package)
    except (Exception, SystemExit) as e:
        forget(package)
        what = f"{type(e).__name__}: {str(e).splitlines()[0][:300] if str(e) else 'no message'}"
        raise KernelError(
            f"{pin.repo}: {build.variant} is what was pinned, but importing it failed: {what}; pin another version with "
            f"`slipstream kernels lock {pin.repo} --version N`, or do without it"
        ) from e
    package.tag = Opened(
        module, pin.repo, pin.revision, build.variant, build.sha256, where, None, pin.version, signer
    )  # fmt: skip
    return package.tag


def _check_metadata(pin: Pin, build: Build, texts: dict[str, bytes]) -> str:
    """The name for Python in metadata.json, which must be of the pinned version and fit this machine."""
    from kernels import Metadata
    from kernels.validate import ArchValidator, default_metadata_validators

    try:
        metadata = Metadata.from_bytes(texts[METADATA])
    except (ValueError, KeyError) as e:
        raise KernelError(f"{pin.repo}: the metadata of {build.variant} is not understood: {e}") from e
    if metadata.version is not None and metadata.version != pin.version:
        raise TrustError(f"its metadata says version {metadata.version}, and the lock {pin.version}")
    stated = {d["repo-id"] for d in json.loads(texts[METADATA]).get("kernel-depends", [])}
    if not stated <= set(pin.depends):
        raise TrustError(
            f"it needs kernels that the lock does not list: {', '.join(sorted(stated - set(pin.depends)))}"
        )
    try:
        for validator in (*default_metadata_validators(), ArchValidator()):
            validator.validate_metadata(metadata=metadata, variant=build.variant)
    except (RuntimeError, ImportError, ValueError) as e:
        raise KernelError(f"{pin.repo} cannot run here: {' '.join(str(e).split())[:400]}") from e
    return str(metadata.name.python_name)


def _layer(module: ModuleType, repo: str, name: str) -> Any:
    from importlib import import_module

    try:
        layers = import_module(f"{module.__name__}.layers")
        return getattr(layers, name)
    except (ImportError, AttributeError) as e:
        raise KernelError(f"{repo} has no layer {name}: {e}") from e
