"""What this user accepted on this machine: files of the working folder, and the highest version of each pinned kernel.

A folder that someone else made may hold a kernels.lock and a policy that allow their code. So these two count only as they were when
`slipstream kernels lock` wrote or accepted them here, or when they are named.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from slipstream.config.paths import config_root
from slipstream.errors import TrustError
from slipstream.trust.lock import Lock, write_atomically


def record_path() -> Path:
    return config_root() / "kernels-accepted.json"


def is_accepted(path: Path, data: bytes) -> bool:
    """Whether the file with this content was accepted."""
    return bool(_read()["files"].get(str(path.resolve())) == hashlib.sha256(data).hexdigest())


def versions(lock: Path) -> dict[str, int]:
    """Repository -> the version that this lock had when it was last accepted."""
    return dict(_read()["versions"].get(str(lock.resolve()), {}))


def accept(lock: Lock, policy: Path, text: bytes) -> None:
    """Record both as they were agreed to: the lock as it is written, and this text of the policy."""
    assert lock.path is not None
    known = _read()
    for path, data in ((lock.path, lock.text().encode()), (policy, text)):
        known["files"][str(path.resolve())] = hashlib.sha256(data).hexdigest()
    known["versions"][str(lock.path.resolve())] = {
        p.repo: p.version for p in lock.pins.values() if p.version is not None
    }
    write_atomically(record_path(), json.dumps(known, indent=1) + "\n", 0o600)


def _read() -> dict[str, Any]:
    path = record_path()
    try:
        known = json.loads(path.read_text())
        files = {str(k): str(v) for k, v in known["files"].items()}
        versions = {str(k): {str(r): int(n) for r, n in v.items()} for k, v in known["versions"].items()}
    except FileNotFoundError:
        return {"files": {}, "versions": {}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise TrustError(f"{path} is damaged ({e}); remove it, and accept again with: slipstream kernels lock") from e
    return {"files": files, "versions": versions}
