"""Who signed a build: the Sigstore bundle that publishers of the Hub put beside metadata.json, verified without a network.

The signature is over metadata.json, and metadata.json has the hash of every other file. The library that publishers use leaves
bytecode out of these hashes, and trusts a root of keys in a cache folder; here every file must have its hash, and the root is the one
inside the installed `sigstore` package, or the file that the policy names.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slipstream.errors import TrustError
from slipstream.trust.lock import File

METADATA = "metadata.json"
BUNDLE = "metadata.json.sigstore"
_ISSUER = "1.3.6.1.4.1.57264.1.1"  # Sigstore's extension of a certificate
_ROOT = "https%3A%2F%2Ftuf-repo-cdn.sigstore.dev/trusted_root.json"


ANY = ("*/*", "/")  # whatever the policy allows


@dataclass(frozen=True, slots=True)
class Signer:
    """Whose signature counts.

    Attributes:
        identity: what the certificate was issued to: a workflow's URI or an e-mail address.
        issuer: who checked that identity.
        repository: from which source repository the workflow must have run.
        repos: patterns of the repositories on the Hub that it may sign for, and folders below which it may for local ones.
    """

    identity: str
    issuer: str
    repository: str | None = None
    repos: tuple[str, ...] = ANY


def matches(pattern: str, repo: str) -> bool:
    """`org/*` is every repository of org. A star never reaches over the slash. A path is a folder and all that lies below it."""
    if pattern.startswith("/"):
        return Path(repo).is_relative_to(pattern)
    parts, names = pattern.split("/"), repo.split("/")
    return len(parts) == len(names) == 2 and all(map(fnmatchcase, names, parts))


def signed_by(metadata: bytes, bundle: bytes, files: Mapping[str, File], root: Path | None) -> Any:
    """Verify the signature of a build with these files. Returns the certificate, for `check_signer`.

    Raises:
        TrustError: the bundle is damaged, its signature is not one of this metadata, or the metadata is not of these files.
    """
    if find_spec("sigstore") is None:
        raise TrustError("it is signed, and what verifies that is not installed: pip install 'slipstream[kernels]'")
    from sigstore.errors import Error, VerificationError
    from sigstore.models import Bundle, TrustedRoot
    from sigstore.verify import Verifier

    path = root or _installed_root()
    try:
        trusted = TrustedRoot.from_file(str(path))
    except (Error, ValueError, OSError) as e:
        raise TrustError(f"the keys to verify signatures with cannot be read from {path}: {e}") from e
    seen = _Certificate()
    try:
        Verifier(trusted_root=trusted).verify_artifact(metadata, Bundle.from_json(bundle), seen)
    except (Error, VerificationError, ValueError) as e:
        raise TrustError(f"its signature is not valid: {e}") from e
    _check_digest(metadata, files)
    return seen.found


def identity_of(certificate: Any) -> tuple[str, str]:
    """To whom it was issued, and who vouched for that name."""
    from cryptography.x509 import ExtensionNotFound, RFC822Name, SubjectAlternativeName, UniformResourceIdentifier

    try:
        names = certificate.extensions.get_extension_for_class(SubjectAlternativeName).value
    except ExtensionNotFound:
        return "nobody", "nobody"
    kinds = (UniformResourceIdentifier, RFC822Name)
    issuers = [e.value.value for e in certificate.extensions if e.oid.dotted_string == _ISSUER]
    issuer = issuers[0].decode(errors="replace") if issuers else "nobody"
    return ", ".join(n for kind in kinds for n in names.get_values_for_type(kind)) or "nobody", issuer


def check_signer(certificate: Any, repo: str, signers: tuple[Signer, ...]) -> None:
    """
    Raises:
        TrustError: none of `signers` is whom the certificate names.
    """
    from sigstore.errors import VerificationError
    from sigstore.verify import policy

    for signer in signers:
        rules: list[Any] = [policy.Identity(identity=signer.identity, issuer=signer.issuer)]
        if signer.repository is not None:
            rules.append(policy.OIDCSourceRepositoryURI(signer.repository))
        if not any(matches(pattern, repo) for pattern in signer.repos):
            continue
        try:
            policy.AllOf(rules).verify(certificate)
        except VerificationError:
            continue
        return
    who, issuer = identity_of(certificate)
    raise TrustError(
        f"it is signed by {who} (says {issuer}), whom the policy does not list as a signer for {repo}; add a [[signers]] "
        "entry if it is to be trusted"
    )


class _Certificate:
    """A policy of sigstore's that accepts anybody, and keeps who it was: check_signer decides."""

    def __init__(self) -> None:
        self.found: Any = None

    def verify(self, cert: Any) -> None:
        self.found = cert


def _installed_root() -> Path:
    """Sigstore's own keys as they came with the package: never the copy in a cache folder, which is not verified offline."""
    import sigstore

    return Path(next(iter(sigstore.__path__)), "_store", _ROOT)


def _check_digest(metadata: bytes, files: Mapping[str, File]) -> None:
    try:
        digest = json.loads(metadata)["digest"]
        if digest["algorithm"] != "sha256":
            raise TrustError(f"its signed hashes are {digest['algorithm']}; only sha256 is understood")
        signed = {name: base64.b64decode(value, validate=True).hex() for name, value in digest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise TrustError(
            f"what was signed does not list the files of the build: {METADATA} has no usable digest"
        ) from e
    have = {name: file.sha256 for name, file in files.items() if name not in (METADATA, BUNDLE)}
    if signed != have:
        names = sorted(n for n in signed.keys() | have.keys() if signed.get(n) != have.get(n))
        raise TrustError(f"what was signed are other files: {', '.join(names[:5])} differ from the signed list")
