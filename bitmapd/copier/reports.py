"""What people hear of the copier's troubles: one event for each kind (pure).

1. An error that becomes an event is `last_error`, too, and so is one that is not worth an event.
2. Why the secondary stays away may be another reason than why it went: each reason is told once,
   not with every attempt.
"""

from __future__ import annotations

from collections.abc import Callable

Emit = Callable[..., None]


class Reports:
    """See the module docstring.  `where` is offset and length in bytes."""

    def __init__(self, emit: Emit, primary: str, secondary: str) -> None:
        self._emit = emit
        self._primary = primary
        self._secondary = secondary
        self.last_error: OSError | None = None

    # -- the primary ----------------------------------------------------------------------
    def not_read(self, where: tuple[int, int], error: OSError) -> None:
        self.last_error = error
        self._emit(
            "copy-error",
            device=self._primary,
            offset_bytes=where[0],
            length_bytes=where[1],
            message=f"cannot read the primary: {_reason(error)}",
        )

    def not_flushed(self, error: OSError) -> None:
        """The primary, whoever asked for it."""
        self._emit(
            "copy-error",
            device=self._primary,
            message=f"cannot flush the primary: {_reason(error)}",
        )

    # -- the secondary --------------------------------------------------------------------
    def refused(self, where: tuple[int, int], error: OSError) -> None:
        self.last_error = error
        self._emit(
            "secondary-error",
            secondary=self._secondary,
            offset_bytes=where[0],
            length_bytes=where[1],
            message=f"the secondary refuses a write: {_reason(error)}",
        )

    def link_down(self, error: OSError) -> None:
        self._emit(
            "link-down",
            secondary=self._secondary,
            message=f"the secondary failed: {_reason(error)}",
        )

    def link_up(self) -> None:
        self._emit("link-up", secondary=self._secondary)

    def not_opened(self, error: OSError) -> None:
        if str(error) != str(self.last_error):
            self._emit(
                "link-error",
                secondary=self._secondary,
                message=f"cannot open the secondary: {_reason(error)}",
            )
        self.last_error = error

    def forgot(self, offset_bytes: int) -> None:
        self._emit(
            "secondary-forgot",
            secondary=self._secondary,
            offset_bytes=offset_bytes,
            message="it does not hold what it had confirmed; everything is compared, and copied"
            " where it differs",
        )


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
