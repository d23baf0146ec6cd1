"""`dmctl`: parse, run one command, turn errors into messages and exit statuses.

1. Nothing a user can cause ends in a traceback, unless `--debug` asks for it.
2. With `--json` stdout holds one JSON document, also when the command fails.
3. If stdout cannot be written the command ends: without a word as by SIGPIPE if its reader has
   gone, else with the error of stdout.  What it had done is done.
4. Modules of commands are imported when their command runs: `dmctl status` starts quickly.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from argparse import Namespace
from collections.abc import Sequence
from io import TextIOWrapper

from bitmapd.config import Paths
from bitmapd.errors import BitmapdError, explain
from bitmapd.hardening import keep_standard_descriptors
from dmctl.cli.context import Context
from dmctl.cli.output import Output, OutputLost, discard
from dmctl.cli.parser import build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status; `SystemExit` only for --help, --version and the like."""
    words = list(sys.argv[1:] if argv is None else argv)
    _prepare_streams()
    output = Output(os.environ, as_json="--json" in words)
    debug = "--debug" in words
    try:
        try:
            args = build_parser().parse_args(words)
            output = Output(
                os.environ, as_json=args.json, quiet=args.quiet > 0, verbose=args.verbose
            )
            status = run(args, output)
        except KeyboardInterrupt:
            status = 128 + signal.SIGINT
        except BitmapdError as error:
            status = _report(output, error, debug)
        except OSError as error:
            status = _report(output, explain(error), debug)
        except (OutputLost, SystemExit):
            raise
        except Exception as error:  # noqa: BLE001  (a mistake of the program is reported, not shown raw)
            kind = type(error).__name__
            mistake = BitmapdError(f"internal error: {kind}: {error}", hint="run it with --debug")
            status = _report(output, mistake, debug)
        output.flush()
    except OutputLost as lost:
        status = _report_lost(output, lost, debug)
    except SystemExit:
        try:
            output.flush()
        except OutputLost as lost:
            raise SystemExit(_report_lost(output, lost, debug)) from None
        raise
    return status


def _prepare_streams() -> None:
    """Characters that a stream's encoding lacks are escaped; one that is closed is no error."""
    keep_standard_descriptors()
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _report_lost(output: Output, lost: OutputLost, debug: bool) -> int:
    discard(sys.stdout)
    if isinstance(lost.error, BrokenPipeError):
        return 128 + signal.SIGPIPE
    error = explain(lost.error, "standard output")
    if debug:
        traceback.print_exc()
    output.error(error)
    return error.exit_status


def run(args: Namespace, output: Output) -> int:
    module, _, function = args.run.partition(":")
    context = Context(Paths.find(os.environ, args.config_dir, args.run_dir), output)
    command = getattr(importlib.import_module(f"dmctl.cli.{module}"), function)
    return int(command(context, args))


def _report(output: Output, error: BitmapdError, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    if output.as_json:
        output.json_error(error)
    else:
        output.error(error)
    return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
