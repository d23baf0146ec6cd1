"""The lab's front door.

    python -m tests.vm.lab run [--disk NAME=SIZE[,4k][,none]]... [--share DIR] -- COMMAND...
    python -m tests.vm.lab pytest [--results DIR] [-- ARGUMENTS...]
    python -m tests.vm.lab check

`run` boots a guest, runs one command in it, in this folder, and ends with its status.  `pytest`
runs the tests of tests/vm/guest; what pytest says, its closing line included, is this
program's output (see `tests/vm/suite.py`; DIR is results/vm by default).  `check` says whether a
guest can run here, and fetches the kernel.  Where none can run, `pytest` says so loudly and ends
with status 0, or with 1 if LAB_REQUIRED is set.

For tests on the host: `Guest`, `Disk`, `LossyDisk` (see `tests/vm/machine.py`).
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path

from tests.vm.disks import GIB, MIB, Disk, GuestDisk, LossyDisk, parse
from tests.vm.kernel import CHECKOUT, VmUnavailable, ready
from tests.vm.lossy import Loss, LossyStore, Mode
from tests.vm.lossy_server import LossyServer
from tests.vm.machine import (
    CommandFailed,
    Guest,
    GuestDied,
    Job,
    Result,
)
from tests.vm.qemu import accelerator, check_machine
from tests.vm.suite import Suite, pass_on, standard_disks

__all__ = [
    "GIB",
    "MIB",
    "CommandFailed",
    "Disk",
    "Guest",
    "GuestDied",
    "GuestDisk",
    "Job",
    "Loss",
    "LossyDisk",
    "LossyServer",
    "LossyStore",
    "Mode",
    "Result",
    "VmUnavailable",
    "standard_disks",
]


def main() -> int:
    arguments = _arguments()
    # So that a guest and its files go when somebody ends this program.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return int(arguments.action(arguments))
    except GuestDied as error:
        print(f"lab: THE GUEST DIED: {error}", flush=True)
        return 1


def _run(arguments: argparse.Namespace) -> int:
    with Guest(
        [parse(text) for text in arguments.disk],
        memory_mib=arguments.memory,
        share=arguments.share and arguments.share.resolve(),
        console=arguments.console,
    ) as guest:
        print(f"lab: up after {guest.boot_s:.1f} s", file=sys.stderr)
        words = arguments.words
        if len(words) == 1:
            words = ["bash", "-c", words[0]]
        try:
            job = guest.start(words, cwd=Path.cwd(), env=_python_path(), sink=pass_on)
            status = job.wait(arguments.timeout, check=False).status
        finally:
            for line in guest.complaints():
                print(f"lab: kernel: {line}", file=sys.stderr)
    print(f"lab: the command ended with {status}", file=sys.stderr)
    return status if status >= 0 else 128 - status


def _pytest(arguments: argparse.Namespace) -> int:
    try:
        check_machine()
        ready()
    except VmUnavailable as reason:
        print(f"lab: SKIPPED, no test of the guest was run: {reason}", flush=True)
        return 1 if os.environ.get("LAB_REQUIRED") else 0
    results = (arguments.results or CHECKOUT / "results" / "vm").resolve()
    print(f"lab: {shlex.join(accelerator())}", flush=True)
    suite = Suite(results, arguments.words, arguments.memory, _say)
    return suite.run()


def _say(text: str) -> None:
    print("lab:", text, flush=True)


def _check(arguments: argparse.Namespace) -> int:
    try:
        check_machine()
        kernel = ready()
    except VmUnavailable as reason:
        print(f"lab: no guest can run here: {reason}")
        return 1
    print(f"lab: Linux {kernel.release}, {shlex.join(accelerator())}")
    return 0


def _python_path() -> dict[str, str]:
    return {"PATH": f"{CHECKOUT}/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.vm.lab", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(required=True)
    run = actions.add_parser("run", help="run one command in a guest")
    run.add_argument("--disk", action="append", default=[], metavar="NAME=SIZE")
    run.add_argument("--share", type=Path, help="folder that both sides may write")
    run.add_argument("--console", type=Path, help="file for what the kernel said")
    run.add_argument("--timeout", type=float, default=1200, metavar="SECONDS")
    run.set_defaults(action=_run)
    suite = actions.add_parser("pytest", help="run tests/vm/guest in a guest")
    suite.add_argument("--results", type=Path, help="default: results/vm")
    suite.set_defaults(action=_pytest)
    for action in (run, suite):
        action.add_argument("--memory", type=int, default=3072, metavar="MIB")
        action.add_argument("words", nargs="*", metavar="WORD")
    check = actions.add_parser("check", help="whether a guest can run here")
    check.set_defaults(action=_check)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
