"""The catalogue of events: every name that may be emitted, how loud it is, what it means (pure).

An event is looked up here wherever something depends on its name: the level in the log, whether
repetitions are held back, whether `status` shows it as `last_error`, `dmctl events --explain`,
docs/events.md and the man page.  So there is one place to add an event, and no list to forget.

1. Every name that the programs emit has a row, every row is emitted, and a row names all fields
   that come with its event.  A test walks the source for that.
2. What becomes `last_error` is at least a warning in the log; an event whose name ends in `-error`
   is an error.
3. An unknown name is emitted as an `UNKNOWN` notice: a mistake in a name must not stop a write.

Texts are Markdown; a chapter of docs/recovery.md is named *in italics*.
"""

from __future__ import annotations

from bitmapd.control.eventkinds import UNKNOWN, EventKind
from bitmapd.control.eventrows import attach, pair, sites, volume

EVENTS = {event.name: event for event in (*volume.ROWS, *attach.ROWS, *pair.ROWS, *sites.ROWS)}


def lookup(name: str) -> EventKind:
    return EVENTS.get(name, UNKNOWN)


def markdown() -> str:
    """docs/events.md."""
    rows = "".join(
        f"| `{event.name}` | {event.level.name.lower()}{_marks(event)} |"
        f" {', '.join(f'`{field}`' for field in event.fields)} | {event.meaning} |"
        f" {event.advice} |\n"
        for event in EVENTS.values()
    )
    return (
        "# Events\n\n"
        "<!-- Made from bitmapd/control/eventrows by `make docs`; edit it there. -->\n\n"
        "`dmctl events NAME` shows what happened since the start, then what comes; `--now` ends"
        " after the\npast ones, `--explain` prints this table. Each has `at`, `volume`, `event` and"
        " the fields below. 1000\nare kept: after that the oldest of the most frequent kind goes"
        " first.\n\n"
        "† repetitions are let through five times in ten seconds; the next one says in"
        " `suppressed` how many\nwere held back. ‡ `dmctl status` shows the latest of these in"
        " `last_error`. Chapters *in italics* are\nthose of [recovery.md](recovery.md).\n\n"
        "| event | level | fields | meaning | what to do |\n"
        "| --- | --- | --- | --- | --- |\n"
        f"{rows}"
    )


def _marks(event: EventKind) -> str:
    return " †" * event.limited + " ‡" * event.is_error
