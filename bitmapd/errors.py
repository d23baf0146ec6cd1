"""Every error a user can meet: class = code = exit status.

An error carries a message that names the value and the reason, and, where there is one, a hint
that says what to do.  `code` is stable and appears in JSON; `exit_status` is the process's exit
status.  Device errors stay `OSError`; they are turned into one of these only at the edge where
a user sees them (`explain`).
"""

from __future__ import annotations

import errno
from typing import Any


class BitmapdError(Exception):
    """Base class: something failed for a reason not covered by a more precise class."""

    code = "failed"
    exit_status = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def to_json(self) -> dict[str, Any]:
        """The `error` object of the command-line contract."""
        return {
            "code": self.code,
            "exit_status": self.exit_status,
            "message": self.message,
            "hint": self.hint,
        }


class UsageError(BitmapdError):
    """A bad value, a bad combination of options, or a bad configuration."""

    code = "usage"
    exit_status = 2


class NotFoundError(BitmapdError):
    """A volume, device or file that was named does not exist."""

    code = "not-found"
    exit_status = 10


class ExistsError(BitmapdError):
    """Something that was to be made exists already."""

    code = "exists"
    exit_status = 11


class BusyError(BitmapdError):
    """Another process uses what was asked for."""

    code = "busy"
    exit_status = 12


class NoSpaceError(BitmapdError):
    """A device or file is too small for its purpose."""

    code = "no-space"
    exit_status = 13


class WrongStateError(BitmapdError):
    """The command does not fit the state that the volume is in."""

    code = "wrong-state"
    exit_status = 14


class UnreachableError(BitmapdError):
    """The partner or the secondary cannot be reached."""

    code = "unreachable"
    exit_status = 15


class SplitBrainError(BitmapdError):
    """Both sides were written independently."""

    code = "split-brain"
    exit_status = 16


class RecordDamagedError(BitmapdError):
    """The stored record cannot be read, or parts of it are damaged."""

    code = "record-damaged"
    exit_status = 20


class FormatTooNewError(BitmapdError):
    """The stored record was written by a newer program."""

    code = "format-too-new"
    exit_status = 21


class ForeignRecordError(BitmapdError):
    """The stored record belongs to another volume, or is not the newest one."""

    code = "foreign-record"
    exit_status = 22


class PermissionError_(BitmapdError):
    """The caller may not do this."""

    code = "permission"
    exit_status = 30


class TimeOutError(BitmapdError):
    """Something did not happen within the time that was given."""

    code = "time-out"
    exit_status = 40


class DegradedError(BitmapdError):
    """The volume works, but not as it should."""

    code = "degraded"
    exit_status = 100


class DifferencesError(BitmapdError):
    """Primary and secondary are not in sync, or differ where they should not."""

    code = "differences"
    exit_status = 101


class Unanswered(OSError):
    """The connection was lost before an answer came: the other end may still do what it was asked
    to do."""


class OtherMediumError(OSError):
    """What was opened is not the medium that was meant; it has been let go of."""


def error_from_json(data: dict[str, Any]) -> BitmapdError:
    """Rebuild an error that came over the control socket; unknown codes become `BitmapdError`."""
    classes = BitmapdError.__subclasses__()
    by_code = {cls.code: cls for cls in classes if cls.code != BitmapdError.code}
    cls = by_code.get(str(data.get("code")), BitmapdError)
    return cls(str(data.get("message", "unknown error")), data.get("hint"))


_BY_ERRNO: dict[int, type[BitmapdError]] = {
    errno.ENOENT: NotFoundError,
    errno.ENOTDIR: NotFoundError,
    errno.ENODEV: NotFoundError,
    errno.ENXIO: NotFoundError,
    errno.EEXIST: ExistsError,
    errno.EBUSY: BusyError,
    errno.EADDRINUSE: BusyError,
    errno.ENOSPC: NoSpaceError,
    errno.EFBIG: NoSpaceError,
    errno.EDQUOT: NoSpaceError,
    errno.EACCES: PermissionError_,
    errno.EPERM: PermissionError_,
    errno.EROFS: PermissionError_,
    errno.ETIMEDOUT: TimeOutError,
}


def class_for(error: OSError) -> type[BitmapdError]:
    """The class, and so the exit status, that a system call's error has wherever it comes up."""
    return _BY_ERRNO.get(error.errno or 0, BitmapdError)


def refused(error: OSError, doing: str, hint: str | None = None) -> BitmapdError:
    """A system call's error as one of ours, which says what was to be done: `cannot open X`."""
    return class_for(error)(f"{doing}: {error.strerror or error}", hint)


def explain(error: OSError, about: str | None = None) -> BitmapdError:
    """A system call's error as one of ours; it names the file, or else what it is `about`."""
    named = about if error.filename is None else error.filename
    place = f"{named}: " if named is not None else ""
    return class_for(error)(f"{place}{error.strerror or error}")


def printable(text: str, keep: str = "") -> str:
    """The text with `\\x1b` and the like for what a terminal would obey or hide: control
    characters, marks of direction, halves of characters.  Names and messages may come from a
    record, a server, a trace or a file name, and anybody may have written those."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode()
        for char in text
    )
