"""What every command is given, and how one command works on several volumes."""

from __future__ import annotations

import threading
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

from bitmapd.config import Paths, check_name, volume_names
from bitmapd.control.client import SILENCE_S, ControlClient, ask
from bitmapd.errors import BitmapdError, UnreachableError, UsageError, explain
from dmctl.cli.output import Output

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Context:
    paths: Paths
    output: Output

    def control(self, name: str) -> ControlClient:
        """WrongStateError if the volume does not run."""
        return ControlClient(self.paths.control_socket(check_name(name)), name)

    def ask(self, name: str, question: str, *, timeout_s: float = SILENCE_S) -> dict[str, Any]:
        """The answer to a verb that changes nothing; WrongStateError if the volume does not run."""
        path = self.paths.control_socket(check_name(name))
        return dict(ask(path, name, question, timeout_s=timeout_s))


def worst(statuses: Iterable[int]) -> int:
    """Of several exit statuses the lowest that is not 0: the less specific, the worse."""
    return min((status for status in statuses if status), default=0)


def combine(errors: Sequence[BitmapdError], doing: str) -> BitmapdError:
    """One error for all of them, with the class of the worst; what two of them say is said once."""
    errors = list({(error.message, error.hint): error for error in errors}.values())
    if len(errors) == 1:
        return _like(errors[0], f"{doing}: {errors[0].message}", errors[0].hint)
    lines = "".join(
        f"\n  {error.message}" + (f" ({error.hint})" if error.hint else "") for error in errors
    )
    leader = min(errors, key=lambda error: error.exit_status)
    return _like(leader, f"{doing}, for {len(errors)} reasons:{lines}", None)


def _like(error: BitmapdError, message: str, hint: str | None) -> BitmapdError:
    """An error of the same code; more precise classes have constructors of their own."""
    for cls in BitmapdError.__subclasses__():
        if isinstance(error, cls):
            return cls(message, hint)
    return BitmapdError(message, hint)


def selected(context: Context, args: Namespace, *, default_all: bool) -> list[str]:
    """The volumes that a command line names, each once."""
    names = list(dict.fromkeys(args.names))
    everything = getattr(args, "all", False)
    if everything and names:
        raise UsageError("--all and names exclude each other")
    if not names and not everything and not default_all:
        raise UsageError("no volume was named", hint="name one or more, or say --all")
    return names or volume_names(context.paths)


def side_by_side(
    keys: Sequence[str], work: Callable[[str], T]
) -> Iterator[tuple[str, T | BitmapdError]]:
    """What `work` gives for each, in the order in which they end: one that waits for a process that
    hangs holds up no other.  Its errors are values."""

    def one(key: str) -> T | BitmapdError:
        try:
            return work(key)
        except BitmapdError as error:
            return error
        except OSError as error:
            return explain(error)

    if len(keys) == 1:
        yield keys[0], one(keys[0])
        return
    ended: SimpleQueue[tuple[str, T | BaseException]] = SimpleQueue()

    def run(key: str) -> None:
        try:
            ended.put((key, one(key)))
        except BaseException as mistake:  # noqa: BLE001  (raised below)
            ended.put((key, mistake))

    for key in keys:
        # An interrupt ends the program, whatever they wait for.
        threading.Thread(target=run, args=(key,), name=key, daemon=True).start()
    for _ in keys:
        key, value = ended.get()
        if isinstance(value, BaseException) and not isinstance(value, BitmapdError):
            raise value
        yield key, value


class StillWaitingError(UnreachableError):
    """What was asked for has begun, and comes about by itself when the partner does."""


def each(
    context: Context,
    command: str,
    names: Sequence[str],
    doing: str,
    work: Callable[[str], dict[str, Any]],
) -> int:
    """Do `work` for every volume, side by side; the worst exit status.

    With JSON one document covers all volumes; it has an `error` if one of them failed.
    """
    rows: dict[str, dict[str, Any]] = {}
    errors: list[BitmapdError] = []
    for name, value in side_by_side(names, work):
        if not isinstance(value, BitmapdError):
            rows[name] = {"name": name, **value, "error": None}
            continue
        errors.append(value)
        result = "waiting" if isinstance(value, StillWaitingError) else "failed"
        rows[name] = {"name": name, "result": result, "error": value.to_json()}
        if not context.output.as_json:
            context.output.error(value, f"cannot {doing} '{name}'")
    if context.output.as_json:
        body: dict[str, Any] = {"volumes": [rows[name] for name in names]}
        if errors:
            body["error"] = min(errors, key=lambda error: error.exit_status).to_json()
        context.output.json(command, body)
    return worst(error.exit_status for error in errors)
