"""The catalogue of events (invariants of bitmapd/control/catalogue.py by number), and that source
and documents agree with it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bitmapd.control.catalogue import EVENTS, lookup, markdown
from bitmapd.control.eventkinds import UNKNOWN, Level
from bitmapd.control.states import STATES

ROOT = Path(__file__).parents[3]
CATALOGUE = "bitmapd/control/eventrows"
EMITTERS = {"emit", "_emit", "_emit_event"}
# Calls of the same name that are no events: bytes of the NBD server.
NO_EVENTS = {"bitmapd/nbd/server/connection.py"}


@dataclass(frozen=True)
class Call:
    place: str
    names: tuple[str, ...]  # empty: not a literal
    fields: frozenset[str]
    more_fields: bool  # `**`: fields that the source does not name


def _literals(node: ast.expr) -> tuple[str, ...]:
    """The strings that an expression can be."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return (node.value,)
    if isinstance(node, ast.IfExp):
        return _literals(node.body) + _literals(node.orelse)
    return ()


def _calls() -> Iterator[Call]:
    """Every call that emits an event, and every event that is made by hand."""
    for top in ("bitmapd", "dmctl"):
        for path in sorted((ROOT / top).rglob("*.py")):
            where = str(path.relative_to(ROOT))
            if where in NO_EVENTS:
                continue
            tree = ast.parse(path.read_text())
            forwarded = {
                node
                for function in ast.walk(tree)
                if isinstance(function, ast.FunctionDef) and function.name in EMITTERS
                for node in ast.walk(function)
            }
            for node in ast.walk(tree):
                place = f"{where}:{getattr(node, 'lineno', 0)}"
                if isinstance(node, ast.Dict):
                    items = zip(node.keys, node.values, strict=True)
                    pairs = {_literals(key): value for key, value in items if key is not None}
                    names = _literals(pairs[("event",)]) if ("event",) in pairs else ()
                    if names:
                        fields = {key[0] for key in pairs if key} - {"event"}
                        yield Call(place, names, frozenset(fields), more_fields=None in node.keys)
                if not isinstance(node, ast.Call) or node in forwarded:
                    continue
                function = node.func
                called = getattr(function, "attr", getattr(function, "id", ""))
                if called in EMITTERS and node.args:
                    words = [keyword.arg for keyword in node.keywords]
                    yield Call(
                        place,
                        _literals(node.args[0]),
                        frozenset(word for word in words if word is not None),
                        more_fields=None in words,
                    )


CALLS = list(_calls())


def test_1_every_event_that_is_emitted_has_a_row() -> None:
    assert len(CALLS) > 40, "the walk finds the calls"
    unknown = [
        f"{call.place} emits '{name}'"
        for call in CALLS
        for name in call.names or ("a name that is no literal",)
        if name not in EVENTS
    ]
    assert not unknown, f"add to {CATALOGUE}, then run make docs: {unknown}"


def test_1_every_row_is_emitted_and_names_its_fields() -> None:
    wrong = []
    for event in EVENTS.values():
        calls = [call for call in CALLS if event.name in call.names]
        fields = frozenset().union(*(call.fields for call in calls))
        if not calls:
            wrong.append(f"nothing emits '{event.name}'")
        if fields - set(event.fields):
            wrong.append(f"'{event.name}' does not name {sorted(fields - set(event.fields))}")
        if set(event.fields) - fields and not any(call.more_fields for call in calls):
            wrong.append(f"'{event.name}' never has {sorted(set(event.fields) - fields)}")
    assert not wrong, f"{CATALOGUE}: {wrong}"


def test_2_what_becomes_the_last_error_is_no_notice() -> None:
    for event in EVENTS.values():
        if event.name.endswith("-error"):
            assert event.is_error, event.name
        if event.is_error:
            assert event.level <= Level.WARNING, event.name


def test_3_an_unknown_name_is_a_notice() -> None:
    assert lookup("from-the-future") is UNKNOWN
    assert (UNKNOWN.level, UNKNOWN.limited, UNKNOWN.is_error) == (Level.NOTICE, False, False)
    assert all(lookup(name).name == name for name in EVENTS)


def test_names_and_texts_fit_the_documents() -> None:
    for event in EVENTS.values():
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", event.name)
        for text in (event.meaning, event.advice):
            assert text.isprintable()
            assert "|" not in text
            assert not text.endswith("."), event.name


def test_the_document_is_made_from_the_catalogue() -> None:
    stored = (ROOT / "docs/events.md").read_text()
    assert stored == markdown(), "docs/events.md is out of date: run make docs"


def test_chapters_that_are_named_exist() -> None:
    chapters = set(re.findall(r"^## (.*)$", (ROOT / "docs/recovery.md").read_text(), re.MULTILINE))
    named = {
        chapter
        for event in EVENTS.values()
        for chapter in re.findall(r"\*([^*]+)\*", f"{event.meaning} {event.advice}")
    }
    assert named
    assert named <= chapters


def test_chapters_that_hints_name_exist() -> None:
    chapters = re.findall(r"^##+ (.*)$", (ROOT / "docs/recovery.md").read_text(), re.MULTILINE)
    sources = [path for room in ("bitmapd", "dmctl") for path in (ROOT / room).rglob("*.py")]
    text = "\n".join(path.read_text() for path in sources)
    named = set(re.findall(r"'([A-Z][^'\n]+)'\s*(?:in)?[\s\"]+(?:in )?docs/recovery\.md", text))
    assert {"Split brain", "Both were written", "The record is lost"} <= named
    assert named <= set(chapters)


def test_no_other_document_lists_events() -> None:
    """A row of a table that begins with an event would be a second list."""
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        if path.name == "events.md":
            continue
        rows = re.findall(r"^\| `([a-z-]+)`", path.read_text(), re.MULTILINE)
        assert not set(rows) & set(EVENTS) - set(STATES) - {"record-damaged"}, path
