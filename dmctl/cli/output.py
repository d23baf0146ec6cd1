"""What the command line prints: tables and JSON on stdout, everything else on stderr.

1. Colour and progress bars appear only on a terminal and never with NO_COLOR.  Answers to questions
   are read from the terminal; without one a question that was not answered by `--yes` is an error.
2. All text for people passes through `printable`: what came from a record, a server, a trace or a
   file name cannot command the terminal, nor look like a line of ours.  JSON is exact: it escapes
   what is not ASCII.
3. A stdout that does not take what is written is `OutputLost`, whose reason `main` reports.  What
   cannot be said on stderr is not said: no command ends or changes its status for it.  A stream
   that was closed from the start takes everything.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TextIO

from bitmapd.errors import BitmapdError, UsageError, printable

_COLOURS = {"red": "31", "yellow": "33", "green": "32"}


class OutputLost(Exception):
    """Standard output does not take what is written."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


class Bar(Protocol):
    """Takes the progress of one operation, a fraction between 0 and 1."""

    def __call__(self, fraction: float) -> None: ...


class Output:
    """Streams and how much is said on them."""

    def __init__(
        self,
        environment: Mapping[str, str],
        *,
        as_json: bool = False,
        quiet: bool = False,
        verbose: int = 0,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        stdin: TextIO | None = None,
    ) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.verbose = verbose
        self._out = stdout or sys.stdout
        self._err = stderr or sys.stderr
        self._in = stdin or sys.stdin
        self._plain = bool(environment.get("NO_COLOR")) or environment.get("TERM") == "dumb"

    # -- stdout ---------------------------------------------------------------------------
    def line(self, text: str = "") -> None:
        self._print(printable(text))

    def text(self, text: str) -> None:
        """Several lines that we have made."""
        self._print(printable(text, keep="\n\t").rstrip("\n"))

    def event(self, fields: Mapping[str, Any]) -> None:
        """One JSON object on a line of its own, at once."""
        self._print(json.dumps(fields))
        self.flush()

    def json(self, command: str, body: Mapping[str, Any]) -> None:
        version = {"command": command, "major": 1, "minor": 0}
        self._print(json.dumps({"output_version": version, **body}, indent=1))

    def flush(self) -> None:
        """OutputLost unless all that was printed has been written."""
        try:
            self._out.flush()
        except OSError as error:
            raise OutputLost(error) from error

    def _print(self, text: str) -> None:
        try:
            print(text, file=self._out)
        except OSError as error:
            raise OutputLost(error) from error

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Columns as wide as they have to be; a cell may carry a colour as `colour:text`."""
        cells = [[_split(cell) for cell in row] for row in rows]
        widths = [max(len(row[i][1]) for row in [[("", h) for h in head], *cells])
                  for i in range(len(head))]  # fmt: skip
        self._print("  ".join(h.ljust(w) for h, w in zip(head, widths, strict=True)).rstrip())
        for row in cells:
            padded = [
                self._paint(colour, text, self._out) + " " * (width - len(text))
                for (colour, text), width in zip(row, widths, strict=True)
            ]
            self._print("  ".join(padded).rstrip())

    def _paint(self, colour: str, text: str, stream: TextIO) -> str:
        if not colour or self._plain or not stream.isatty():
            return text
        return f"\033[{_COLOURS[colour]}m{text}\033[0m"

    # -- stderr ---------------------------------------------------------------------------
    def say(self, text: str) -> None:
        if not self.quiet:
            self._tell(printable(text))

    def detail(self, text: str) -> None:
        if self.verbose:
            self.say(text)

    def error(self, error: BitmapdError, doing: str | None = None) -> None:
        """The error's message and hint; with JSON, `json_error` is used instead."""
        text = f"{doing}: {error.message}" if doing else error.message
        label = self._paint("red", "error", self._err)
        self._tell(f"dmctl: {label}: {_indented(text)}")
        if error.hint:
            self._tell(f"hint: {_indented(error.hint)}")

    def json_error(self, error: BitmapdError) -> None:
        self._print(json.dumps({"error": error.to_json()}, indent=1))

    def _tell(self, text: str, end: str = "\n") -> None:
        try:
            print(text, end=end, file=self._err, flush=True)
        except OSError:  # see 3
            discard(self._err)

    @contextmanager
    def progress(self, text: str) -> Iterator[Bar]:
        """A bar on a terminal, nothing elsewhere."""
        if self.quiet or self._plain or not self._err.isatty():
            yield lambda fraction: None
            return
        from rich.console import Console  # noqa: PLC0415  (slow to import, rarely needed)
        from rich.progress import Progress  # noqa: PLC0415

        with Progress(console=Console(file=self._err), transient=True) as bars:
            task = bars.add_task(text, total=1.0)
            yield lambda fraction: bars.update(task, completed=min(fraction, 1.0))

    def confirm(self, loses: str, question: str, *, yes: bool) -> None:
        """Say what would be lost and ask; UsageError unless the answer is yes."""
        if yes:
            return
        if not self._in.isatty():
            raise UsageError(f"{loses}; there is no terminal to ask on", hint="add --yes to do it")
        self._tell(f"{printable(loses)}.\n{printable(question)} [y/N] ", end="")
        if self._in.readline().strip().lower() not in ("y", "yes"):
            raise BitmapdError("not confirmed; nothing was changed")


def discard(stream: TextIO) -> None:
    """Have a stream go nowhere from now on, and what is left in its buffer too: the interpreter
    would write it at the exit, and end with a status of its own when that fails again."""
    with suppress(OSError, ValueError):  # one that has no descriptor has no such end
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _indented(text: str) -> str:
    """A message of several lines; none but the first looks like the beginning of one."""
    first, *more = printable(text, keep="\n").split("\n")
    return "\n".join([first, *(line if line.startswith(" ") else f"  {line}" for line in more)])


def _split(cell: str) -> tuple[str, str]:
    colour, mark, text = cell.partition(":")
    return (colour, printable(text)) if mark and colour in _COLOURS else ("", printable(cell))
