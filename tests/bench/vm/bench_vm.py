"""The volume beside the mirrors of Debian's kernel, in one virtual machine: `make bench-vm`.

Boots a guest, has `inside.py` measure in it, prints tables, writes everything to `results/` as
JSON and the tables to docs/benchmarks-vm.md.  `--quick` runs every part once with small numbers:
it shows that the command works, its figures mean little and docs/benchmarks-vm.md is left alone.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.bench import machine
from tests.bench.vm import far, report
from tests.bench.vm.rig import SIZE_BYTES
from tests.vm.lab import Guest, GuestDied, VmUnavailable, accelerator, pass_on

ROOT = Path(__file__).resolve().parents[3]
MEMORY_MIB = 6144
TIMEOUT_S = 2 * 3600.0  # of which all parts take more than one: a volume's turn lasts for an era
_SAID = ("processor", "cores", "memory", "kernel")


def measure(scale: str, only: list[str], console: Path) -> dict[str, Any]:
    """What the guest has found out."""
    with ExitStack() as stack:
        # The other site has its disks in memory, too.
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="bvm", dir="/dev/shm")))
        site = stack.enter_context(far.site(folder, far.HOST_ADDRESS, SIZE_BYTES))
        where, out = folder / "site.json", folder / "results.json"
        where.write_text(json.dumps(asdict(site)))
        with Guest(
            memory_mib=MEMORY_MIB, share=folder, console=console, with_network=True
        ) as guest:
            print(f"bench: guest up after {guest.boot_s:.0f} s", flush=True)
            command = [sys.executable, "-m", "tests.bench.vm.inside"]
            command += ["--scale", scale, "--site", str(where), "--out", str(out)]
            command += [f"--only={part}" for part in only]
            guest.start(command, cwd=ROOT, sink=pass_on).wait(TIMEOUT_S)
            results: dict[str, Any] = json.loads(out.read_text())
            results["complaints"] = guest.complaints()
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description="compare the volume with mirrors in a guest")
    parser.add_argument("--quick", action="store_true", help="a run that only shows it works")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PART",
        help="only this part, with the contenders that it needs; no page is written",
    )
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    options = parser.parse_args()
    # So that the guest goes when somebody ends this program.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    options.results.mkdir(parents=True, exist_ok=True)
    described = machine.describe()
    began = datetime.now(UTC)
    try:
        console = options.results / "bench-vm-console.txt"
        results = measure("quick" if options.quick else "full", options.only, console)
    except VmUnavailable as reason:
        print(f"bench: NOTHING WAS MEASURED: no virtual machine can run here: {reason}")
        return 1
    except GuestDied as error:
        print(f"bench: THE GUEST DIED: {error}")
        return 1
    said = {key: described[key] for key in _SAID}
    load = "load average at the start"
    results |= {
        "at": began.isoformat(timespec="seconds"),
        "command": "make bench-vm",
        "machine": {
            **said,
            "guest": f"{' '.join(accelerator())}, 2 processors, {MEMORY_MIB} MiB",
            **results["versions"],
            load: described[load],
            "load average at the end": machine.load_average(),
            "minutes": f"{(datetime.now(UTC) - began).total_seconds() / 60:.0f}",
        },
    }
    partial = options.quick or options.only
    document = None if partial else ROOT / "docs" / "benchmarks-vm.md"
    path = report.write(results, options.results, document)
    print(report.parts_to_terminal(results) if options.only else report.to_terminal(results))
    print(f"\nbench: results in {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    for name, why in results["missing"].items():
        print(f"bench: NOT MEASURED: {name}: {why}")
    for line in results["complaints"]:
        print(f"bench: THE KERNEL COMPLAINED: {line}")
    return 1 if results["complaints"] or not all(results.get("equal", {}).values()) else 0


if __name__ == "__main__":
    sys.exit(main())
