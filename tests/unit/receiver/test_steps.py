"""Steps: one after another, or together; errors come out where they belong."""

from __future__ import annotations

import pytest

from bitmapd.media.base import Done
from bitmapd.receiver.steps import Steps, Turn, run, together


class Operation:
    def __init__(self) -> None:
        self.dones: list[Done] = []

    def __call__(self, done: Done) -> None:
        self.dones.append(done)


def test_a_step_begins_when_the_one_before_has_ended() -> None:
    one, other = Operation(), Operation()
    ends: list[object] = []

    def steps() -> Steps[str]:
        yield one
        yield other
        return "result"

    run(steps(), lambda error, result: ends.append((error, result)))
    assert (len(one.dones), len(other.dones), ends) == (1, 0, [])
    one.dones[0](None)
    assert (len(other.dones), ends) == (1, [])
    other.dones[0](None)
    assert ends == [(None, "result")]


def test_an_error_is_raised_where_the_step_is() -> None:
    operation = Operation()
    ends: list[object] = []
    failure = OSError(5, "bad")

    def handled() -> Steps[str]:
        try:
            yield operation
        except OSError as error:
            return str(error.errno)
        return "nothing"

    def unhandled() -> Steps[None]:
        yield operation

    run(handled(), lambda error, result: ends.append((error, result)))
    run(unhandled(), lambda error, result: ends.append((error, result)))
    for done in operation.dones:
        done(failure)
    assert ends == [(None, "5"), (failure, None)]


def test_without_a_step_it_ends_at_once() -> None:
    ends: list[object] = []

    def nothing() -> Steps[int]:
        return 3
        yield

    run(nothing(), lambda error, result: ends.append(result))
    assert ends == [3]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_together_ends_with_the_last_and_the_first_error(order: tuple[int, ...]) -> None:
    operations = [Operation() for _ in range(3)]
    ends: list[OSError | None] = []
    together(operations)(ends.append)
    errors = [OSError(number) for number in range(3)]
    for number in order:
        assert not ends
        operations[number].dones[0](errors[number] if number else None)
    assert ends == [errors[1 if order == (0, 1, 2) else 2]]


def test_turns_are_taken_one_after_another_also_behind_an_error() -> None:
    turn = Turn()
    began: list[str] = []
    waiting: list[Done] = []
    ended: list[tuple[OSError | None, str | None]] = []

    def steps(name: str) -> Steps[str]:
        began.append(name)
        yield waiting.append
        return name

    for name in ("a", "b", "c"):
        run(turn.alone(steps(name)), lambda error, result: ended.append((error, result)))
    assert began == ["a"]
    failure = OSError(5, "five")
    waiting.pop()(failure)
    assert (began, ended) == (["a", "b"], [(failure, None)])
    waiting.pop()(None)
    waiting.pop()(None)
    assert began == ["a", "b", "c"]
    assert ended == [(failure, None), (None, "b"), (None, "c")]
    run(turn.alone(steps("d")), lambda error, result: None)
    assert began[-1] == "d"
