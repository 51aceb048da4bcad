"""The ways a run can end other than well, each with its exit code. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.redaction import printable


class RunError(Exception):
    """An error that ends the run in one line: ``what: why; do: …``. ``code`` is the exit code of the process.

    ``is_reported_elsewhere`` is for an error that all ranks raise together where it is known which
    of them reports it: the others end with its code in silence. Where it is not known, the first
    rank that fails reports it (``distributed.peer_failure``).
    """

    code = 1

    def __init__(self, what: str, *, do: str = "", is_reported_elsewhere: bool = False) -> None:
        self.what, self.do = printable(what), printable(do)
        self.is_reported_elsewhere = is_reported_elsewhere
        super().__init__(f"{self.what}; do: {self.do}" if do else self.what)


@dataclass(frozen=True)
class SessionEnd:
    """What a session of ranks knew of the error that ended it."""

    step: int | None  # that training was at, None before the first
    is_reported_elsewhere: bool  # another rank reports it, or what caused it


def set_session_end(error: Exception, end: SessionEnd) -> None:
    """Attach ``end`` to the error that ended a session, for whoever reports it."""
    error.session_end = end  # type: ignore[attr-defined]


def session_end_of(error: Exception) -> SessionEnd | None:
    """What :func:`set_session_end` attached; None for an error that ended no session."""
    return getattr(error, "session_end", None)


class ConfigError(RunError):
    """The configuration cannot be meant: a typo, a wrong type, an impossible value."""

    code = 64


class DataError(RunError):
    """A data set is missing, damaged or does not fit the configuration, or a batch never came."""

    code = 65


class ServiceError(RunError):
    """A service or system package that the run needs is not there."""

    code = 69


class WriteError(RunError):
    """A file cannot be written: no space, read-only, owned by another job."""

    code = 73


class Preempted(RunError):
    """The run was asked to stop and has saved a checkpoint: start it again."""

    code = 75


class PeerError(RunError):
    """Another rank failed or stopped answering: start all of them again."""

    code = 76


class PermissionDenied(RunError):
    """A path exists but this user may not use it as wanted."""

    code = 77


class IntegrityError(RunError):
    """Masks differ between ranks, or a file is not what its hash says: do not retry."""

    code = 78


class NumericsError(RunError):
    """A loss or gradient is not finite."""

    code = 79
