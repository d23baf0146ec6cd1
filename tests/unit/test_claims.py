"""Every claim of the pair and each crash of a point has a test; what texts name is there."""

from __future__ import annotations

import re
from pathlib import Path

from tests.property.test_points_crashes import ROWS

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ("bitmapd", "dmctl", "docs", "examples", "tests", "tools")
PAGE = ROOT / "tests" / "claims.md"
CRASHES = ROOT / "tests" / "crashes.md"
# Claims of one appliance with a record of its own are those before 16 and their twins.
PAIR = {*range(16, 36), *range(48, 68), *range(80, 100)}
# Rows of the table of crashes of points.
ALL_CRASHES = {f"{number:02}" for number in range(1, 31)}


def rows() -> list[tuple[set[int], list[str]]]:
    found = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 3 and cells[1][:1].isdigit():
            found.append(({int(number) for number in cells[1].split(",")}, cells[3].split(", ")))
    return found


def test_every_claim_has_a_test() -> None:
    assert set().union(*(claims for claims, _ in rows())) == PAIR


def crashes() -> dict[str, list[str]]:
    lines = [
        [cell.strip() for cell in text.split("|")] for text in CRASHES.read_text().splitlines()
    ]
    return {line[1]: line[4].split(", ") for line in lines if line[1:2] and line[1].isdigit()}


def test_every_crash_has_a_test() -> None:
    assert crashes().keys() == ALL_CRASHES
    assert ROWS.keys() <= ALL_CRASHES


def test_every_test_is_there() -> None:
    for names in [names for _, names in rows()] + list(crashes().values()):
        for name in names:
            path, _, test = name.strip("`").partition("::")
            text = (ROOT / path).read_text()
            if test:
                assert re.search(rf"^def {test}\(", text, re.MULTILINE), name


def test_every_module_that_a_text_names_is_there() -> None:
    modules = [path for top in TEXTS for path in (ROOT / top).rglob("*.py")]
    pages = [path for top in TEXTS for path in (ROOT / top).rglob("*.md")]
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in [*modules, *pages, *ROOT.glob("*.md")]
        for name in re.findall(r"\b(?:\w+/)+\w+\.py\b", path.read_text())
        if not any(module.match(name) for module in modules)
    }
    assert missing == set()
