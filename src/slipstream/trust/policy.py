"""kernels-policy.toml: whose code may run here at all. What it does not list is refused."""

from __future__ import annotations

from dataclasses import dataclass, field

from slipstream.trust.lock import Lock, Pin


@dataclass(frozen=True, slots=True)
class Policy:
    """What may be loaded. `Policy()` refuses everything; `denied` says why where it is not simply empty."""

    lock: Lock = field(default_factory=lambda: Lock({}))
    denied: str | None = None

    @classmethod
    def find(cls, lock: str | None = None, policy: str | None = None) -> Policy:
        """The named files, else those of the working folder, else those of the user's config folder; none refuses everything.

        Raises:
            TrustError: a named file is missing, or one cannot be understood.
        """
        raise NotImplementedError

    def why_not(self, name: str) -> str | None:
        """Why `name` (org/repo, org/repo:Layer, or a path) may not be loaded, from the two files alone: for choose(). Reads no file."""
        raise NotImplementedError

    def pinned(self, name: str) -> Pin:
        """The entry of the lock for `name`.

        Raises:
            TrustError: it is not allowed or not pinned.
        """
        raise NotImplementedError
