"""Events on their way to the log: the last error among them is in the status (edge)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from bitmapd.control.catalogue import lookup
from bitmapd.control.events import iso_time


class Told:
    """`last_error`: code, message and time, as the status has it."""

    def __init__(self, emit: Callable[..., None]) -> None:
        self.last_error: dict[str, str] | None = None
        self._emit_event = emit

    def emit(self, event: str, **fields: Any) -> None:
        if lookup(event).is_error:
            message = str(fields.get("message", event))
            self.last_error = {"code": event, "message": message, "at": iso_time(time.time())}
        self._emit_event(event, **fields)
