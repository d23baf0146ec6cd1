"""What a row of the catalogue of events is (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Level(IntEnum):
    """Syslog's levels, as far as events have them."""

    CRITICAL = 2
    ERROR = 3
    WARNING = 4
    NOTICE = 5


@dataclass(frozen=True, slots=True)
class EventKind:
    """One row.  `limited`: repetitions are held back.  `is_error`: becomes `last_error`."""

    name: str
    level: Level
    fields: tuple[str, ...]
    meaning: str
    advice: str
    limited: bool = False
    is_error: bool = False


UNKNOWN = EventKind("", Level.NOTICE, (), "no row of this catalogue", "report it")
