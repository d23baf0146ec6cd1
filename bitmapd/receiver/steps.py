"""Operations of devices one after another, written as a generator (pure).

A step is whatever takes a `done`, such as `partial(device.flush)`.  The generator yields it and
goes on when it has ended; an error comes out of the `yield` as OSError.  What was read is in the
buffer that the step was given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from bitmapd.media.base import Done, after_all

Step = Callable[[Done], None]
T = TypeVar("T")
Steps = Generator[Step, None, T]


def run(steps: Steps[T], done: Callable[[OSError | None, T | None], None]) -> None:
    """Begin it; `done` is called once with an OSError that nobody in there handled, or with the
    result: at once if there is no step, else from the end of the last one."""

    def go_on(error: OSError | None) -> None:
        try:
            step = steps.send(None) if error is None else steps.throw(error)
        except StopIteration as end:
            done(None, end.value)
        except OSError as failure:
            done(failure, None)
        else:
            step(go_on)

    go_on(None)


def together(steps: Sequence[Step]) -> Step:
    """All of them at once, at least one; ends with the last, and with the first error."""

    def begin(done: Done) -> None:
        ended = after_all(len(steps), done)
        for step in steps:
            step(ended)

    return begin


class Turn:
    """Steps of which no two are carried out at once: whoever comes first goes first."""

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: deque[Done] = deque()

    def alone(self, steps: Steps[T]) -> Steps[T]:
        """These steps, when all before them have ended."""
        if self._is_taken:
            yield self._waiting.append
        self._is_taken = True  # whoever gives it passes it on at once
        try:
            result = yield from steps
        except Exception:
            self._give()
            raise
        self._give()
        return result

    def _give(self) -> None:
        if self._waiting:
            self._waiting.popleft()(None)
        else:
            self._is_taken = False
