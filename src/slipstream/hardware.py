"""The device that was asked for or found, and the bytes free on it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from slipstream.config import EngineConfig
from slipstream.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Hardware:
    """The device and the bytes free on it."""

    device: str
    name: str
    free_bytes: int
    capability: tuple[int, int] | None = None


def find_hardware(asked: EngineConfig, why: dict[str, str]) -> Hardware:
    """What the plan is made for; the reason goes into `why`.

    Raises:
        ConfigError: the device is not there.
    """
    device = asked.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        why["device"] = "CUDA is available" if device == "cuda" else "no CUDA device is available"
    else:
        why["device"] = "asked for"
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ConfigError(f"device: {device} was asked for, but torch sees no CUDA device; use device='cpu'")
        index = torch.device(device).index or 0
        if index >= torch.cuda.device_count():
            raise ConfigError(f"device: there is no {device}; torch sees {torch.cuda.device_count()} CUDA devices")
        free, _ = torch.cuda.mem_get_info(index)
        free += torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)  # what torch keeps to use again
        return Hardware(device, torch.cuda.get_device_name(index), free, torch.cuda.get_device_capability(index))
    if device.startswith("mps") and not torch.backends.mps.is_available():
        raise ConfigError("device: mps was asked for, but torch sees no Apple GPU; use device='cpu'")
    return Hardware(device, _cpu_name(), _available_memory())


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    except OSError:
        pass
    return f"CPU, {torch.get_num_threads()} threads"


def _reclaimable() -> int:
    """Bytes of files that a cgroup counts as used, and that the system drops when they are needed."""
    with open("/sys/fs/cgroup/memory.stat") as f:
        return sum(int(line.split()[1]) for line in f if line.startswith("inactive_file "))


def _available_memory() -> int:
    """Bytes that can be taken without swapping: what the system says is available, within a cgroup's limit."""
    try:
        with open("/proc/meminfo") as f:
            free = next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            text = limit.read().strip()
            return free if text == "max" else max(0, min(free, int(text) - int(used.read()) + _reclaimable()))
    except (OSError, ValueError):
        return free
