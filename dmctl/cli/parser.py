"""The one parser tree: every command, option and help text.

Commands name the function that runs them as `module:function`, so that building the parser imports
none of them.  Man pages and shell completion are made from this tree.
"""

from __future__ import annotations

import argparse

from bitmapd import version_text
from dmctl.cli.options import Parser, PrintCompletion, add_global_options
from dmctl.cli.parser_failover import add_failover, add_receivers, add_roles
from dmctl.cli.parser_tools import add_configuration, add_partner_keys, add_records, add_simulate
from dmctl.cli.parser_volumes import add_boot, add_copying, add_volumes, add_watching

EXIT_CODES = """\
exit status:
  0 done or nothing to do      1 failed                    2 usage or configuration
  10 not found                 11 exists already           12 busy
  13 no space                  14 wrong state              15 secondary or partner unreachable
  16 split brain               20 record damaged           21 format too new
  22 record of another volume  30 permission               40 time-out
  100 degraded                 101 not in sync, or differences found
  128+N ended by signal N
Of several volumes the lowest status that is not 0 counts.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dmctl",
        description="Asynchronous mirrors of block devices: create, run, watch and repair them.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_global_options(parser, again=False)
    parser.add_argument("--version", action="version", version=f"dmctl {version_text()}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=("bash", "zsh"),
        help="print a completion script for the shell",
    )
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    add_volumes(commands)
    add_boot(commands)
    add_copying(commands)
    add_watching(commands)
    add_records(commands)
    add_configuration(commands)
    add_simulate(commands)
    add_partner_keys(commands)
    add_failover(commands)
    add_receivers(commands)
    add_roles(commands)
    return parser
