"""Errors that end a run, each class with its exit code. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.redaction import printable


def with_advice(what: str, do: str) -> str:
    """Return ``what; do: …``; after a question there is no semicolon."""
    separator = " " if what.endswith("?") else "; "
    return f"{what}{separator}do: {do}" if do else what


class RunError(Exception):
    """An error that ends the run in one line: ``what: why; do: …``. ``code`` is the exit code of the process.

    ``is_reported_elsewhere`` is set on an error that all ranks raise together, on every rank but the
    one that reports it: the others end silently with the same code. Other errors are reported by the
    first rank that fails (``distributed.peer_failure``).
    """

    code = 1

    def __init__(self, what: str, *, do: str = "", is_reported_elsewhere: bool = False) -> None:
        self.what, self.do = printable(what), printable(do)
        self.is_reported_elsewhere = is_reported_elsewhere
        super().__init__(with_advice(self.what, self.do))


@dataclass(frozen=True)
class SessionEnd:
    """Details that a session of ranks adds to the error that ended it."""

    step: int | None  # step of training; None before the first
    is_reported_elsewhere: bool  # another rank reports the error or its cause


def set_session_end(error: Exception, end: SessionEnd) -> None:
    """Attach ``end`` to the error that ended a session, for the report."""
    error.session_end = end  # type: ignore[attr-defined]


def session_end_of(error: Exception) -> SessionEnd | None:
    """Return what :func:`set_session_end` attached; None if the error did not end a session."""
    return getattr(error, "session_end", None)


class ConfigError(RunError):
    """The configuration is invalid: a typo, a wrong type or an invalid value."""

    code = 64


class DataError(RunError):
    """A data set is missing, is damaged or does not fit the configuration, or no batch arrived in time."""

    code = 65


class ServiceError(RunError):
    """A service or package that the run needs is not available."""

    code = 69


class WriteError(RunError):
    """A file cannot be written: no space, read-only, or owned by another job."""

    code = 73


class Preempted(RunError):
    """The run was asked to stop and has saved a checkpoint: start it again."""

    code = 75


class PeerError(RunError):
    """Another rank failed or does not respond: start all ranks again."""

    code = 76


class PermissionDenied(RunError):
    """This user may not read or write a path."""

    code = 77


class IntegrityError(RunError):
    """Masks differ between ranks, or a file does not match its hash: do not retry."""

    code = 78


class NumericsError(RunError):
    """A loss or gradient is not finite."""

    code = 79
