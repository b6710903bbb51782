"""A Sigstore of our own: certificate authority, certificate log and transparency log with fresh keys, and the bundles that they make.

What it writes follows the formats of Sigstore (RFC 6962 for the logs), and is read by the real `sigstore` library.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

ISSUER = "https://token.actions.githubusercontent.com"
WORKFLOW = "https://github.com/acme/kernels/.github/workflows/build.yaml@refs/heads/main"
SOURCE = "https://github.com/acme/kernels"
_SCT = ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
_USAGE = dict.fromkeys(
    ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign", "encipher_only",
     "decipher_only"), False,
)  # fmt: skip


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def spki(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )  # fmt: skip


def sign(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    return key.sign(data, ec.ECDSA(hashes.SHA256()))


def utf8(text: str) -> bytes:
    """DER of a UTF8String."""
    data = text.encode()
    assert len(data) < 128
    return bytes([0x0C, len(data)]) + data


class Sigstore:
    def __init__(self) -> None:
        self.ca, self.ct, self.log = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
        self.start = datetime.now(UTC).replace(microsecond=0) - timedelta(days=2)
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "acme root")])
        self.certificate = (
            self._builder(self.ca, self.name)
            .not_valid_after(self.start + timedelta(days=3650))
            .add_extension(x509.BasicConstraints(True, 0), critical=True)
            .add_extension(x509.KeyUsage(digital_signature=False, key_cert_sign=True, **_USAGE), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.ca.public_key()), critical=False)
            .sign(self.ca, hashes.SHA256())
        )

    def _builder(self, key: ec.EllipticCurvePrivateKey, subject: x509.Name) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self.name).public_key(key.public_key())
        return builder.serial_number(x509.random_serial_number()).not_valid_before(self.start)

    def trusted_root(self) -> bytes:
        def log(key: ec.EllipticCurvePrivateKey, url: str) -> dict[str, Any]:
            return {
                "baseUrl": url, "hashAlgorithm": "SHA2_256", "logId": {"keyId": b64(hashlib.sha256(spki(key)).digest())},
                "publicKey": {"rawBytes": b64(spki(key)), "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": valid},
            }  # fmt: skip

        valid = {"start": self.start.strftime("%Y-%m-%dT%H:%M:%SZ")}
        der = self.certificate.public_bytes(serialization.Encoding.DER)
        authority = {
            "subject": {"organization": "acme", "commonName": "acme root"}, "uri": "https://fulcio.invalid",
            "certChain": {"certificates": [{"rawBytes": b64(der)}]}, "validFor": valid,
        }  # fmt: skip
        return json.dumps(
            {
                "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
                "tlogs": [log(self.log, "https://rekor.invalid")],
                "certificateAuthorities": [authority],
                "ctlogs": [log(self.ct, "https://ct.invalid")],
                "timestampAuthorities": [],
            }
        ).encode()

    def bundle(self, artifact: bytes, identity: str = WORKFLOW, issuer: str = ISSUER, source: str = SOURCE) -> bytes:
        key = ec.generate_private_key(ec.SECP256R1())
        signed_at = self.start + timedelta(hours=1)
        certificate = self._leaf(key, identity, issuer, source, signed_at)
        signature = sign(key, artifact)
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        body = json.dumps(
            {
                "apiVersion": "0.0.1", "kind": "hashedrekord",
                "spec": {
                    "data": {"hash": {"algorithm": "sha256", "value": hashlib.sha256(artifact).hexdigest()}},
                    "signature": {"content": b64(signature), "publicKey": {"content": b64(pem)}},
                },
            }, sort_keys=True, separators=(",", ":"),
        ).encode()  # fmt: skip
        log_id = hashlib.sha256(spki(self.log)).digest()
        root = hashlib.sha256(b"\0" + body).digest()
        note = f"rekor.invalid - 1\n1\n{b64(root)}\n"
        checkpoint = f"{note}\n\u2014 rekor.invalid {b64(log_id[:4] + sign(self.log, note.encode()))}\n"
        time = int(signed_at.timestamp())
        promised = {"body": b64(body), "integratedTime": time, "logID": log_id.hex(), "logIndex": 0}
        promise = sign(self.log, json.dumps(promised, sort_keys=True, separators=(",", ":")).encode())
        entry = {
            "logIndex": "0", "logId": {"keyId": b64(log_id)}, "kindVersion": {"kind": "hashedrekord", "version": "0.0.1"},
            "integratedTime": str(time), "inclusionPromise": {"signedEntryTimestamp": b64(promise)},
            "inclusionProof": {
                "logIndex": "0", "rootHash": b64(root), "treeSize": "1", "hashes": [],
                "checkpoint": {"envelope": checkpoint},
            },
            "canonicalizedBody": b64(body),
        }  # fmt: skip
        der = certificate.public_bytes(serialization.Encoding.DER)
        return json.dumps(
            {
                "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
                "verificationMaterial": {"certificate": {"rawBytes": b64(der)}, "tlogEntries": [entry]},
                "messageSignature": {
                    "messageDigest": {"algorithm": "SHA2_256", "digest": b64(hashlib.sha256(artifact).digest())},
                    "signature": b64(signature),
                },
            }
        ).encode()

    def _leaf(
        self, key: ec.EllipticCurvePrivateKey, identity: str, issuer: str, source: str, at: datetime
    ) -> x509.Certificate:
        def oid(last: int) -> ObjectIdentifier:
            return ObjectIdentifier(f"1.3.6.1.4.1.57264.1.{last}")

        builder = (
            self._builder(key, x509.Name([]))
            .not_valid_after(self.start + timedelta(hours=3))
            .add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=False, **_USAGE), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.ca.public_key()), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity)]), critical=True)
            .add_extension(x509.UnrecognizedExtension(oid(1), issuer.encode()), critical=False)
            .add_extension(x509.UnrecognizedExtension(oid(8), utf8(issuer)), critical=False)
            .add_extension(x509.UnrecognizedExtension(oid(12), utf8(source)), critical=False)
        )
        before = builder.sign(self.ca, hashes.SHA256())
        tbs = hashlib.sha256(spki(self.ca)).digest() + struct.pack("!I", len(before.tbs_certificate_bytes))[1:]
        tbs += before.tbs_certificate_bytes
        stamp = int(at.timestamp()) * 1000
        signed = sign(self.ct, struct.pack("!BBQH", 0, 0, stamp, 1) + tbs + b"\0\0")
        sct = b"\0" + hashlib.sha256(spki(self.ct)).digest() + struct.pack("!Q", stamp) + b"\0\0"
        sct += b"\x04\x03" + struct.pack("!H", len(signed)) + signed  # SHA-256 with ECDSA
        listed = struct.pack("!HH", len(sct) + 2, len(sct)) + sct
        assert len(listed) < 128
        octets = bytes([4, len(listed)]) + listed
        return builder.add_extension(x509.UnrecognizedExtension(_SCT, octets), critical=False).sign(
            self.ca, hashes.SHA256()
        )
