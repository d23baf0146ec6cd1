"""docs/partner-protocol.md says what the code does: numbers, places of fields, mistakes."""

from __future__ import annotations

import re
from pathlib import Path

from bitmapd.partner.codec import encode
from bitmapd.partner.messages import Hello
from bitmapd.peer.frames import HEADER_BYTES, ErrorCode, Kind, Part
from bitmapd.peer.frames import encode as frame
from tests.unit.partner.hellos import hello

DOCS = Path(__file__).resolve().parents[3] / "docs"
PAGE = (DOCS / "partner-protocol.md").read_text()
FIELDS = "| offset | bytes | field |"


def rows(head: str, page: str = PAGE) -> list[list[str]]:
    """The cells of the first table with this first line, without its head."""
    lines = page[page.index(head) :].splitlines()[2:]
    table = lines[: next(at for at, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def numbers(cell: str) -> list[int]:
    return [int(word) for word in re.findall(r"\d+", cell)]


def fields(table: list[list[str]]) -> list[tuple[int, int]]:
    """Offset and size of each field; a row may have several, one behind the other."""
    found = []
    for offset, sizes, *_ in table:
        at = int(offset)
        for size in numbers(sizes):
            found.append((at, size))
            at += size
    return found


def test_every_kind_is_on_the_page_with_its_number() -> None:
    listed = {}
    for cell, *_ in rows("| kind | payload | answer |"):
        names = re.findall(r"[A-Z]+", cell)
        listed.update(zip(names, numbers(cell), strict=True))
    assert listed == {kind.name: int(kind) for kind in Kind}


def test_every_error_is_on_the_page() -> None:
    listed = [number for cell, *_ in rows("| code | |") for number in numbers(cell)]
    assert listed == [int(code) for code in ErrorCode]


def test_the_fields_of_a_frame_are_where_the_page_says() -> None:
    table = rows(FIELDS)
    places = fields(table)
    assert [at for at, _ in places] == [0, *(at + size for at, size in places)][:-1]
    assert sum(places[-1]) == HEADER_BYTES
    raw = frame(Part(Kind.ADD, 1, 7, b"abcde"), 9)
    values = [int.from_bytes(raw[at : at + size], "little") for at, size in places]
    kind, flags, length = values[2:5]
    assert (kind, flags, length, *values[6:]) == (Kind.ADD, 1, 5, 9, 7)


def test_the_fields_of_hello_are_where_the_page_says() -> None:
    table = rows(FIELDS, PAGE[PAGE.index("### HELLO\n") :])
    places = fields(table)
    said = hello(1, lowest=1, highest=3, term=4, session=5, last_paired=6, most_requests=7)
    (part,) = encode(said)
    names = list(Hello.__dataclass_fields__)[: len(places)]
    for name, (at, size) in zip(names, places, strict=True):
        raw, value = part.payload[at : at + size], getattr(said, name)
        if name == "generations":
            value = b"".join(value)
        assert (raw if isinstance(value, bytes) else int.from_bytes(raw, "little")) == value, name
    texts_at = int(table[-1][0])
    assert part.payload[texts_at + 2 :].startswith(said.name.encode())


def test_the_rules_are_numbered_as_modules_cite_them() -> None:
    chapter = PAGE[PAGE.index("## Rules\n") : PAGE.index("## Connection\n")]
    listed = [int(number) for number in re.findall(r"^(\d+)\. ", chapter, re.MULTILINE)]
    assert listed == list(range(1, 19))


def test_each_mistake_on_the_page_is_one_that_a_model_finds() -> None:
    models = "".join(path.read_text() for path in (DOCS / "models").glob("*.pml"))
    seeded = set(re.findall(r"\bBUG_\w+", models))
    assert set(re.findall(r"\bBUG_\w+", PAGE)) <= seeded
