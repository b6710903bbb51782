"""What may be executed that did not come with slipstream: a policy, a lock, and the proof that bytes are what was pinned."""

from slipstream.trust.lock import Build, File, Lock, Pin
from slipstream.trust.policy import Policy

__all__ = ["Build", "File", "Lock", "Pin", "Policy"]
