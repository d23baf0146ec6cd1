"""What every command is given, and how one command works on several volumes."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bitmapd.config import Paths, check_name, volume_names
from bitmapd.control.client import ControlClient
from bitmapd.errors import BitmapdError, UsageError, explain
from dmctl.cli.output import Output


@dataclass(frozen=True, slots=True)
class Context:
    paths: Paths
    output: Output

    def control(self, name: str) -> ControlClient:
        """WrongStateError if the volume does not run."""
        return ControlClient(self.paths.control_socket(check_name(name)), name)


def worst(statuses: Iterable[int]) -> int:
    """Of several exit statuses the lowest that is not 0: the less specific, the worse."""
    return min((status for status in statuses if status), default=0)


def combine(errors: Sequence[BitmapdError], doing: str) -> BitmapdError:
    """One error for all of them, with the class of the worst."""
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


def each(
    context: Context,
    command: str,
    names: Sequence[str],
    doing: str,
    work: Callable[[str], dict[str, Any]],
) -> int:
    """Do `work` for every volume, going on after an error; the worst exit status.

    With JSON one document tells of all volumes; it has an `error` if one of them failed.
    """
    rows: list[dict[str, Any]] = []
    errors: list[BitmapdError] = []
    for name in names:
        try:
            rows.append({"name": name, **work(name), "error": None})
        except (BitmapdError, OSError) as problem:
            error = problem if isinstance(problem, BitmapdError) else explain(problem)
            errors.append(error)
            rows.append({"name": name, "result": "failed", "error": error.to_json()})
            if not context.output.as_json:
                context.output.error(error, f"cannot {doing} '{name}'")
    if context.output.as_json:
        body: dict[str, Any] = {"volumes": rows}
        if errors:
            body["error"] = min(errors, key=lambda error: error.exit_status).to_json()
        context.output.json(command, body)
    return worst(error.exit_status for error in errors)
