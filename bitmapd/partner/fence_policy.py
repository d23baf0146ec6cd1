"""When a node has the other fenced by itself, and what a fence agent is told (pure).

A fence agent makes certain that a node can write no more: it cuts its power, or its way to the
storage.  It follows the convention of the fence-agents project: `key=value` lines on standard
input, exit status 0 once it is done.

Invariants:
1. Without a command nothing is fenced: a time-out proves nothing.
2. A node begins by itself only in a cut, after `delay_s`, and only if a host here waits for the
   other: a node that stands by, with no hosts, does not shoot the one that serves.
3. Once one attempt has ended the next one by itself comes after `RETRY_S` at the earliest, unless
   the nodes have been paired meanwhile: an agent that fails must not go round and round, and hosts
   need not wait when a node that has come back dies again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

RETRY_S = 60.0

Options = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class FenceSettings:
    """What the configuration says of fencing."""

    command: str | None = None
    plug: str = ""  # the other node, as the agent calls it
    options: Options = ()
    delay_s: float = 0.0
    timeout_s: float = 60.0
    aborts_io: bool = False  # it ends what the other has on its way, too
    automatic: bool = False


def request(plug: str, options: Options) -> bytes:
    """What the agent reads on standard input.  An option replaces what is said by itself."""
    said = {"action": "off", "plug": plug} | dict(options)
    return "".join(f"{key}={value}\n" for key, value in said.items()).encode()


class Trigger:
    """Whether now is the time; see the module docstring."""

    def __init__(self) -> None:
        self._ended_s = -math.inf  # the last attempt

    def is_due(
        self, settings: FenceSettings, now_s: float, cut_for_s: float | None, waiting: int
    ) -> bool:
        """`cut_for_s`: how long the link has been lost, None in any other state; `waiting`:
        requests of hosts here that wait for the other."""
        if settings.command is None or not settings.automatic:
            return False
        if cut_for_s is None or not waiting or cut_for_s < settings.delay_s:
            return False
        return now_s - self._ended_s >= RETRY_S

    def paired(self) -> None:
        """The nodes are together: the next cut is another one."""
        self._ended_s = -math.inf

    def ended(self, now_s: float) -> None:
        """An attempt is over, whoever had asked for it."""
        self._ended_s = now_s


def last_words(output: bytes, most: int = 400) -> str:
    """The end of what an agent has printed, on one line that a log can hold."""
    text = " ".join(output.decode(errors="replace").split())
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= most else "…" + text[-most:]
