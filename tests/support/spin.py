"""An exhaustive search of a Spin model, as the tests of the models make it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

MODELS = Path(__file__).parents[2] / "docs" / "models"
IS_MISSING = None in map(shutil.which, ("spin", "gcc", "tcc"))
MISSING = "spin, gcc or tcc is not installed: apt-get install spin gcc tcc libc6-dev"
Search = TypeVar("Search")
FULL = "MODEL_FULL" in os.environ  # larger searches are made, too


def searches(wanted: Mapping[str, Iterable[Search]]) -> list[tuple[Search, str]]:
    """Each search with the mistake, or the good end, that it is to find."""
    return [(search, name) for name, many in sorted(wanted.items()) for search in many]


def mistakes_and_ends(model: str) -> set[str]:
    """Which ones a model names."""
    return set(re.findall(r"\b(?:BUG|WITNESS)_[A-Z_]+[A-Z]", (MODELS / model).read_text()))


def errors(
    folder: Path, model: str, defines: Iterable[str], *, ends_early: bool, collapse: bool = False
) -> int:
    """How many errors the search finds; it ends at the first one.  `defines`: NAME or NAME=NUMBER.
    `ends_early`: compiled by tcc, which takes 0.04 s where gcc takes 1 to 2 without optimising;
    what it makes searches half as fast as with gcc -O1.  `collapse`: less memory for states, and
    more time."""
    options = ["-w", "-DSAFETY", "-DNOFAIR", "-DMEMLIM=3000"]
    options += ["-DCOLLAPSE"] if collapse else []
    for command in (
        ["spin", *(f"-D{define}" for define in defines), "-a", str(MODELS / model)],
        [*(["tcc"] if ends_early else ["gcc", "-O1"]), *options, "-o", "pan", "pan.c"],
    ):
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
    done = subprocess.run(
        # -E: a process that waits for ever is no error here; where it would be one a process of the
        # model checks by `timeout`.  -m: a bound on depth that is not reached.
        ["./pan", "-E", "-n", "-m200000"],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        timeout=900 if FULL else 110,
    )
    found = re.search(r"errors: (\d+)", done.stdout)
    assert found is not None, done.stdout
    incomplete = [line for line in done.stdout.splitlines() if line.startswith("error:")]
    incomplete += re.findall("Search not completed", done.stdout) * (found[1] == "0")
    assert not incomplete, done.stdout
    return int(found[1])
