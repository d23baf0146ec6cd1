"""dmctl/cli/context: one command on several volumes."""

from __future__ import annotations

import threading

import pytest

from bitmapd.errors import BitmapdError, BusyError
from dmctl.cli.context import side_by_side


def test_several_are_worked_on_side_by_side() -> None:
    together = threading.Barrier(3, timeout=30)

    def work(key: str) -> str:
        together.wait()
        return key.upper()

    assert dict(side_by_side(["a", "b", "c"], work)) == {"a": "A", "b": "B", "c": "C"}


def test_each_is_given_as_soon_as_it_has_ended() -> None:
    go_on = threading.Event()

    def work(key: str) -> str:
        if key == "slow":
            assert go_on.wait(30)
        return key

    answers = side_by_side(["slow", "quick"], work)
    assert next(answers) == ("quick", "quick")
    go_on.set()
    assert next(answers) == ("slow", "slow")
    assert list(side_by_side([], work)) == []


@pytest.mark.parametrize("keys", [["a"], ["a", "b"]])
def test_errors_are_values_and_mistakes_are_raised(keys: list[str]) -> None:
    def refuse(_key: str) -> str:
        raise BusyError("in use")

    def fail(_key: str) -> str:
        raise FileNotFoundError(2, "No such file", "/x")

    def mistake(_key: str) -> str:
        raise KeyError("mistake")

    for _key, value in side_by_side(keys, refuse):
        assert isinstance(value, BusyError)
    for _key, value in side_by_side(keys, fail):
        assert isinstance(value, BitmapdError)
        assert value.code == "not-found"
    with pytest.raises(KeyError):
        list(side_by_side(keys, mistake))
