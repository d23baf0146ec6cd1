"""What can be wrong with a configuration, and how it is reported (pure)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bitmapd.errors import BitmapdError, PermissionError_, UsageError


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with the configuration."""

    file: str
    key: str | None
    message: str
    hint: str | None = None
    is_denied: bool = False  # this user may not read the file

    def __str__(self) -> str:
        place = self.file if self.key is None else f"{self.file}: {self.key}"
        return f"{place}: {self.message}" + (f" ({self.hint})" if self.hint else "")


class ConfigError(UsageError):
    """The configuration cannot be used; carries every problem that was found."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            only = self.problems[0]
            super().__init__(str(dataclasses.replace(only, hint=None)), only.hint)
        else:
            lines = "".join(f"\n  {problem}" for problem in self.problems)
            super().__init__(f"{len(self.problems)} errors in the configuration:{lines}")

    def to_json(self) -> dict[str, Any]:
        keys = ("file", "key", "message", "hint")
        problems = [{key: getattr(problem, key) for key in keys} for problem in self.problems]
        return BitmapdError.to_json(self) | {"problems": problems}


def denied(file: str, message: str) -> Problem:
    return Problem(file, None, message, "run it as root", is_denied=True)


def config_error(problems: Iterable[Problem]) -> BitmapdError:
    """ConfigError, unless all that is wrong is that this user may not look."""
    found = ConfigError(problems)
    if found.problems and all(problem.is_denied for problem in found.problems):
        return PermissionError_(found.message, found.hint)
    return found


def nearest(word: str, words: Iterable[str]) -> str | None:
    """A hint that names the nearest of the words, if one is near."""
    from difflib import get_close_matches  # noqa: PLC0415  (0.2 MiB, for mistakes alone)

    close = get_close_matches(word.replace("-", "_"), list(words), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else None
