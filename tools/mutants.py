"""Breaks the code in chosen places, one at a time, and demands that a test notices.

    python tools/mutants.py [--sample N] [--only NAME] [--jobs N]

`tests/mutants.toml` has the mistakes: a piece of text of one room, what stands there instead, and
the tests that have to fail then.  Each is made in a copy of the tree.  One that no test notices
*lives*.  The tests that are named are run once unchanged, first: none may fail without a mistake.

`--sample N` takes N of them, others with each commit.  Exit status 1 if one lives.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests/mutants.toml"
TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class Mutant:
    """One mistake."""

    name: str
    room: str  # a folder or file
    before: str
    after: str
    tests: tuple[str, ...]

    def place(self, root: Path) -> Path:
        """The file to break; ValueError if the place is not there exactly once."""
        room = root / self.room
        files = sorted(room.rglob("*.py")) if room.is_dir() else [room]
        found = [file for file in files for _ in range(file.read_text().count(self.before))]
        if len(found) != 1:
            raise ValueError(f"{self.name}: its place stands {len(found)} times in {self.room}")
        return found[0]

    def make(self, root: Path) -> None:
        file = self.place(root)
        file.write_text(file.read_text().replace(self.before, self.after))


def load(table: Path = TABLE) -> list[Mutant]:
    """All of them, in the order of the table."""
    return [
        Mutant(
            entry["name"],
            group["room"],
            entry["before"],
            entry["after"],
            tuple(entry.get("tests", group["tests"])),
        )
        for group in tomllib.loads(table.read_text())["group"]
        for entry in group["mutant"]
    ]


@contextmanager
def copied_tree() -> Iterator[Path]:
    """The files of the checkout, somewhere else."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    ).stdout.decode()  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="mutants") as name:
        folder = Path(name)
        for file in filter(None, listed.split("\0")):
            if (ROOT / file).is_file():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, folder / file)
        yield folder


def run_tests(folder: Path, tests: tuple[str, ...]) -> tuple[bool, str]:
    """Whether they pass in this tree, and the end of what they said."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        result = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False,
            timeout=TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False, "a test hangs"
    if result.returncode not in (0, 1, 2):
        raise RuntimeError(f"{' '.join(command)}: status {result.returncode}\n{result.stdout}")
    last = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return result.returncode == 0, last[0] if last else ""


def judge(mutant: Mutant) -> tuple[Mutant, bool, str]:
    """Whether it is caught, and by what."""
    with copied_tree() as folder:
        mutant.make(folder)
        lives, told = run_tests(folder, mutant.tests)
    return mutant, not lives, told


def chosen(mutants: list[Mutant], only: str | None, sample: int | None) -> list[Mutant]:
    if only is not None:
        return [mutant for mutant in mutants if only in mutant.name]
    if sample is None or sample >= len(mutants):
        return mutants
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    return random.Random(head).sample(mutants, sample)  # noqa: S311


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sample", type=int, help="so many, others with each commit")
    parser.add_argument("--only", help="those whose names hold this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    given = parser.parse_args()
    mutants = chosen(load(), given.only, given.sample)
    for mutant in mutants:
        mutant.place(ROOT)
    failed = 0
    with ThreadPoolExecutor(given.jobs) as pool:
        sets = sorted({mutant.tests for mutant in mutants})
        with copied_tree() as folder:
            for tests, (passed, told) in zip(
                sets, pool.map(lambda tests: run_tests(folder, tests), sets), strict=True
            ):
                if not passed:
                    print(f"fails without a mistake: {' '.join(tests)}: {told}", flush=True)
                    failed += 1
        for mutant, caught, told in pool.map(judge, mutants):
            print(f"{'caught' if caught else 'LIVES '}  {mutant.name}  {told}", flush=True)
            failed += not caught
    print(f"{len(mutants) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
