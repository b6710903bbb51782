"""Where slipstream keeps what it fetched and what it made."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """SLIPSTREAM_HOME, or a folder in the user's cache: models from wheels, records of what was verified, built kernels."""
    if home := os.environ.get("SLIPSTREAM_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "slipstream"


def config_root() -> Path:
    """What the user decided: the kernels that may run here, and which of those decisions were made on this machine."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "slipstream"
