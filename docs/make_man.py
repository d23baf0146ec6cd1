#!/usr/bin/env python3
"""Make the man pages from what the programs themselves say: `make_man.py [FOLDER]`.

dmctl(8) and bitmapd(8) come from their parsers, dmctl.toml(5) from the manuals of the keys,
dmctl-events(7) from the catalogue of events.  The pages are not kept in the repository: they are
never older than the programs.  Without FOLDER docs/events.md is written too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from argparse_manpage.manpage import Manpage

import bitmapd.daemon
from bitmapd import __version__
from bitmapd.config import Key, keys
from bitmapd.config.receiver import receiver_keys
from bitmapd.control import catalogue
from bitmapd.control.eventkinds import EventKind
from dmctl.cli.parser import build_parser

PROJECT = "dmctl"
EVENTS_FILE = Path(__file__).parent / "events.md"


def hide_global_options(parser: argparse.ArgumentParser, *, here: bool = False) -> None:
    """Explain the options that every command takes once, not with every command."""
    for group in parser._action_groups:
        if here and group.title == "global options":
            for action in group._group_actions:
                action.help = argparse.SUPPRESS
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                hide_global_options(command, here=True)


def take_epilogs(parser: argparse.ArgumentParser) -> list[str]:
    """The tables of exit codes, which the man page shows as they are and in one place."""
    taken = [parser.epilog] if parser.epilog else []
    parser.epilog = None
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                taken += take_epilogs(command)
    return taken


def program_page(parser: argparse.ArgumentParser, what: str) -> str:
    hide_global_options(parser)
    epilogs = "\n".join(take_epilogs(parser))
    data = {
        "project_name": PROJECT,
        "version": __version__,
        "description": what,
        "manual_section": "8",
        "manual_title": "System Administration",
    }
    codes = f".SH EXIT STATUS\n.nf\n{_roff(epilogs)}.fi\n" if epilogs else ""
    return f"{Manpage(parser, _data=data)}{codes}"


def _roff(text: str) -> str:
    """Text that roff takes literally."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


def _entry(key: Key, *more: str) -> str:
    facts = [key.kind.syntax]
    if key.default is not None:
        default = str(key.default).lower() if isinstance(key.default, bool) else key.default
        facts.append(f"default {default}")
    elif not key.derived:
        facts.append("required")
    facts += more
    return f".TP\n.B {_roff(key.name)}\n{_roff(key.doc)}\n.br\n({_roff('; '.join(facts))})\n"


def _entry_of_volume(key: Key) -> str:
    place = "also in [defaults]" if key.shared else "in the volume's file only"
    return _entry(key, place, "dmctl set") if key.live else _entry(key, place)


def configuration_page() -> str:
    entries = "".join(_entry_of_volume(key) for key in keys().values())
    of_receivers = "".join(_entry(key) for key in receiver_keys().values())
    return (
        f'.TH DMCTL.TOML 5 "" "{PROJECT} {__version__}" "File Formats"\n'
        ".SH NAME\ndmctl.toml \\- configuration of volumes and receivers\n"
        ".SH SYNOPSIS\n/etc/dmctl/dmctl.toml\n.br\n/etc/dmctl/volumes/\\fINAME\\fR.toml\n"
        ".SH DESCRIPTION\n"
        "Each volume has a file of its own with the keys of volumes, each receiver one with the"
        " keys of receivers. Defaults for all volumes stand in"
        " dmctl.toml, in a table [defaults]. A value in the volume's file wins. A key that is not"
        " known is an error;\n.B dmctl config check\nlists all errors with file and key.\n"
        "Sizes are whole numbers with B KiB MiB GiB TiB or k m g t (powers of 1024), durations"
        " whole numbers with ms s min h.\n"
        f".SH KEYS OF VOLUMES\n{entries}"
        f".SH KEYS OF RECEIVERS\n{of_receivers}"
        ".SH SEE ALSO\n.BR dmctl (8),\n.BR bitmapd (8)\n"
    )


def _event_entry(event: EventKind) -> str:
    facts = [event.level.name.lower()]
    if event.limited:
        facts.append("repetitions are held back")
    if event.is_error:
        facts.append("becomes last_error")
    if event.fields:
        facts.append(f"fields: {', '.join(event.fields)}")
    text = f"{event.meaning[0].upper()}{event.meaning[1:]}. What to do: {event.advice}."
    return f".TP\n.B {_roff(event.name)}\n{_roff(text)}\n.br\n({_roff('; '.join(facts))})\n"


def events_page() -> str:
    entries = "".join(_event_entry(event) for event in catalogue.EVENTS.values())
    return (
        f'.TH DMCTL-EVENTS 7 "" "{PROJECT} {__version__}" "Miscellaneous"\n'
        ".SH NAME\ndmctl-events \\- what volumes report\n"
        ".SH DESCRIPTION\n"
        "What happens to a volume is in the system's log and in the output of"
        "\n.B dmctl events\\fR:\n"
        "one JSON object a line, with at, volume, event and the fields below. Repetitions that are"
        " held back are let through five times in ten seconds; the next one says in suppressed how"
        " many there were. Chapters *in italics* are those of docs/recovery.md.\n"
        f".SH EVENTS\n{entries}"
        ".SH SEE ALSO\n.BR dmctl (8)\n"
    )


def pages() -> dict[str, str]:
    """File name -> content."""
    made = {
        "dmctl.8": program_page(build_parser(), "asynchronous mirrors of block devices"),
        "dmctl.toml.5": configuration_page(),
        "dmctl-events.7": events_page(),
    }
    daemon_parser = getattr(bitmapd.daemon, "build_parser", None)
    if daemon_parser is not None:
        made["bitmapd.8"] = program_page(daemon_parser(), "serve one mirrored volume")
    return made


def main(argv: list[str]) -> int:
    folder = Path(argv[0]) if argv else Path(__file__).parent / "man"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text)
        print(folder / name)
    if not argv:
        EVENTS_FILE.write_text(catalogue.markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
