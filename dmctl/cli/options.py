"""What parsers of commands are made of: the parser, values, and options of several commands."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from bitmapd.config.kinds import from_unit_instance
from bitmapd.errors import UsageError
from bitmapd.units import parse_duration, parse_size
from dmctl.cli.output import Output

FILE = {"bash": "_shtab_compgen_files", "zsh": "_files"}
VOLUME = {"bash": "_dmctl_volumes", "zsh": "_dmctl_volumes"}
FOLDER = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/"}
# Functions of the shells that offer the configured volumes.
_LIST = """\
  local file
  for file in "${DMCTL_CONFIG_DIR:-/etc/dmctl}"/volumes/*.toml; do
    file="${file##*/}"
"""


_VOLUMES = {
    "bash": f"""\
_dmctl_volumes() {{
{_LIST}    compgen -W "${{file%.toml}}" -- "$1"
  done
}}
""",
    "zsh": f"""\
_dmctl_volumes() {{
{_LIST}    compadd -- "${{file%.toml}}"
  done
}}
""",
}


Commands = Any  # argparse keeps the type of a subparsers action to itself


class Parser(argparse.ArgumentParser):
    """Errors are raised instead of printed, so that --json covers them too."""

    def error(self, message: str) -> NoReturn:
        hint = f"see '{self.prog} --help'"
        for action in self._subparsers._group_actions if self._subparsers else []:
            if message.startswith("argument COMMAND: invalid choice") and action.choices:
                word = message.split("'")[1]
                near = difflib.get_close_matches(word, list(action.choices), n=1)
                message = f"there is no command '{word}'"
                hint = f"did you mean '{near[0]}'? {hint}" if near else hint
        raise UsageError(message, hint)

    def _print_message(self, message: str, file: Any = None) -> None:
        """--help and --version: what argparse does with a stream that fails is its own affair."""
        Output(os.environ).text(message)


class PrintCompletion(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        import shtab  # noqa: PLC0415  (slow to import, needed here only)

        script = shtab.complete(parser, str(values), preamble=_VOLUMES[str(values)])
        Output(os.environ).text(script)
        parser.exit()


def duration(text: str) -> float:
    return parse_duration(text)


def count(text: str) -> int:
    """A whole number from 0 on."""
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"{text!r} is not a whole number")
    return int(text)


def latency(text: str) -> float:
    """A duration that may also be in microseconds."""
    number = text.strip().removesuffix("us").strip()
    if text.strip().endswith("us") and number.isascii() and number.isdigit():
        return int(number) / 1e6
    return parse_duration(text)


def sizes(text: str) -> list[int]:
    """Sizes with commas between them."""
    return [parse_size(word) for word in text.split(",")]


def typed(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser of ours for argparse, which wants to name the option in the message itself."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except UsageError as error:
            hint = f" ({error.hint})" if error.hint else ""
            raise argparse.ArgumentTypeError(f"{error.message}{hint}") from None

    return parsed


def completed(action: argparse.Action, how: dict[str, str]) -> None:
    action.complete = how  # type: ignore[attr-defined]  # what shtab looks for


def add_global_options(parser: argparse.ArgumentParser, *, again: bool) -> None:
    """The options that every command takes; `again` on a command, where they have no defaults so
    as not to undo what was said before the command."""

    def default(value: Any) -> Any:
        return argparse.SUPPRESS if again else value

    group = parser.add_argument_group("global options")
    completed(
        group.add_argument(
            "--config-dir",
            metavar="DIR",
            default=default(None),
            help="configuration (default $DMCTL_CONFIG_DIR or /etc/dmctl)",
        ),
        FOLDER,
    )
    completed(
        group.add_argument(
            "--run-dir",
            metavar="DIR",
            default=default(None),
            help="sockets and pid files (default $DMCTL_RUN_DIR or /run/dmctl)",
        ),
        FOLDER,
    )
    group.add_argument(
        "--json", action="store_true", default=default(False), help="print JSON on stdout"
    )
    group.add_argument(
        "-q", "--quiet", action="count", default=default(0), help="say nothing but errors"
    )
    group.add_argument("-v", "--verbose", action="count", default=default(0), help="say more")
    group.add_argument(
        "--debug",
        action="store_true",
        default=default(False),
        help="show where in the program an error arose",
    )


def add_command(
    commands: Commands, name: str, run: str, text: str, more: str = "", epilog: str = ""
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.{' ' if more else ''}{more}",
        epilog=epilog,
        formatter_class=(
            argparse.RawDescriptionHelpFormatter if epilog else argparse.HelpFormatter
        ),
        allow_abbrev=False,
    )
    add_global_options(parser, again=True)
    parser.set_defaults(run=run)
    return parser


def add_name(parser: argparse.ArgumentParser) -> None:
    completed(
        parser.add_argument("name", metavar="NAME", type=from_unit_instance, help="the volume"),
        VOLUME,
    )


def add_names(parser: argparse.ArgumentParser, *, all_option: bool = True) -> None:
    completed(
        parser.add_argument(
            "names", metavar="NAME", nargs="*", type=from_unit_instance, help="the volumes"
        ),
        VOLUME,
    )
    if all_option:
        parser.add_argument("--all", action="store_true", help="every configured volume")


def add_yes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yes", action="store_true", help="answer the question with yes")


def add_device(parser: argparse.ArgumentParser, text: str) -> None:
    completed(parser.add_argument("device", metavar="DEV", help=text), FILE)


def add_timeout(parser: argparse.ArgumentParser, text: str, default: float | None = None) -> None:
    parser.add_argument("--timeout", metavar="DURATION", type=typed(duration), default=default,
                        help=text)  # fmt: skip


def add_patience(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--patience", metavar="DURATION", type=typed(duration), default=30.0,
                        help="how long to wait for a secondary on this machine when all else is"
                        " there (default 30s)")  # fmt: skip
