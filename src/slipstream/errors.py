"""Every error that slipstream raises for something outside its own code.

A message says what happened, why, and what to try. Command-line fronts print it on one line and exit with
`exit_code`; a traceback is only ever for a bug of ours.
"""

from __future__ import annotations


class SlipstreamError(Exception):
    """Base of all errors meant for the user."""

    exit_code = 1


class ConfigError(SlipstreamError, ValueError):
    """An engine option is unknown, contradictory or cannot be honoured on this machine."""

    exit_code = 2


class CheckpointError(SlipstreamError):
    """A checkpoint is missing, damaged, hostile, or of an unsupported kind."""

    exit_code = 3


class KernelError(SlipstreamError):
    """No implementation of an op can run this case, or the forced one cannot. `rejected` has (name, why) of each."""

    exit_code = 4

    def __init__(self, message: str, *, rejected: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.rejected = rejected


class CapacityError(SlipstreamError):
    """The model or the request cannot fit into the memory there is; the numbers are in the message."""

    exit_code = 5


class RequestError(SlipstreamError, ValueError):
    """A request is invalid. `field` names the offending parameter where there is one."""

    exit_code = 2

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class TrustError(SlipstreamError):
    """Something that is not pinned and verified was about to be executed."""

    exit_code = 6


class RankError(SlipstreamError):
    """A rank that shares the model died, hangs, or ran out of memory; the message names it and has its last log lines."""

    exit_code = 7
