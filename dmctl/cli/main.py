"""`dmctl`: parse, run one command, turn errors into messages and exit statuses.

1. Nothing a user can cause ends in a traceback, unless `--debug` asks for it.
2. With `--json` stdout holds one JSON document, also when the command fails.
3. Modules of commands are imported when their command runs: `dmctl status` starts quickly.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from argparse import Namespace
from collections.abc import Sequence

from bitmapd.config import Paths
from bitmapd.errors import BitmapdError, explain
from dmctl.cli.context import Context
from dmctl.cli.output import Output
from dmctl.cli.parser import build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status; `SystemExit` only for --help, --version and the like."""
    words = list(sys.argv[1:] if argv is None else argv)
    output = Output(os.environ, as_json="--json" in words)
    debug = "--debug" in words
    try:
        args = build_parser().parse_args(words)
        output = Output(os.environ, as_json=args.json, quiet=args.quiet > 0, verbose=args.verbose)
        status = run(args, output)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader has gone; nothing more may be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BitmapdError as error:
        return _report(output, error, debug)
    except OSError as error:
        return _report(output, explain(error), debug)
    except Exception as error:  # noqa: BLE001  (a mistake of the program is told, not shown raw)
        kind = type(error).__name__
        mistake = BitmapdError(f"internal error: {kind}: {error}", hint="run it with --debug")
        return _report(output, mistake, debug)


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
