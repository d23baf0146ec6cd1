"""The states of a volume, from the most pressing to none: one table (pure).

`dmctl status` shows the state and its hint, `dmctl status --check` makes it the exit status, the
metrics have one row for each, and docs/recovery.md repeats the table.  Tests compare them.

Every state that is an error says what to do, and ends by itself when its cause does.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class State:
    """One row.  `hint` is empty where there is nothing to do."""

    name: str
    check_status: int
    hint: str = ""


_STATES = (
    State("failed", 1, "dmctl events NAME --now; kill -9 its process, then dmctl start NAME"),
    State(
        "split-brain", 16, "see 'Split brain' in docs/recovery.md, of two sites 'Both were written'"
    ),
    State("demoted", 14, "dmctl switchover NAME, or dmctl promote NAME at either site"),
    State(
        "waiting",
        15,
        "start the partner; if it is dead for certain: dmctl takeover NAME --fenced",
    ),
    State(
        "degraded",
        100,
        "dmctl events NAME --now: mend the record device, or see what became of the partner",
    ),
    State("primary-failing", 100, "look for the primary in dmesg; replace it if it goes on"),
    State("link-down", 101, "dmctl events NAME --now says why; it is tried again by itself"),
    State("alone", 101, "bring the other site back as its receiver: dmctl failback NAME, there"),
    State("paused", 101, "dmctl resume NAME"),
    State("no-space", 13, "make room on the secondary; it is tried again by itself"),
    State("secondary-failing", 101, "look at the secondary's disk: it refuses some places"),
    State(
        "journal-full",
        13,
        "'dmctl points NAME' at the receiver: does it apply?  If so it needs a larger journal",
    ),
    State("resyncing", 101, "dmctl wait NAME --for in-sync"),
    State("copying", 0),
    State("in-sync", 0),
    State("receiving", 0),
    State("keeping", 0),
    State("stopped", 14, "dmctl start NAME"),
)
STATES = {state.name: state for state in _STATES}


def check_status(name: str) -> int:
    """Exit status of `dmctl status --check`; a state of a newer version counts as failed."""
    state = STATES.get(name)
    return 1 if state is None else state.check_status


def hint(name: str, volume: str) -> str | None:
    """What to do about the state of that volume."""
    state = STATES.get(name)
    return state.hint.replace("NAME", volume) if state is not None and state.hint else None


def check_codes() -> str:
    """The exit statuses with their states, a line each."""
    by_status: dict[int, list[str]] = {}
    for state in _STATES:
        by_status.setdefault(state.check_status, []).append(state.name)
    return "".join(f"  {status} {', '.join(by_status[status])}\n" for status in sorted(by_status))
