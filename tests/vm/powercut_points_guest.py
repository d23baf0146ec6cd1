"""The guest's part of a round of the power-cut tests of points.

    python -m tests.vm.powercut_points_guest ROUND

Starts the receiver and the volume, waits until a point has everything, compares both sides
(`verified`), then writes numbered pieces, one after the other, until the power goes.  `durable
NUMBER`: the volume knows a committed point that has all writes up to this one.  All in one
process, since starting one takes seconds in an emulated machine.
"""

from __future__ import annotations

import json
import sys

from tests.vm.guest.dmsites import DeviceWriter
from tests.vm.powercut_guest import run, say

NEAR, FAR = "near0", "far0"
WAIT = "300s"


def first_of(round_: int) -> int:
    """The number of a round's first write; what earlier rounds left has lower ones."""
    return round_ * 1_000_000 + 1


def newest_point() -> int:
    number: int = json.loads(run("--json", "status", NEAR))["volumes"][0]["points"]["number"]
    return number


def main() -> None:
    round_ = int(sys.argv[1])
    run("start", FAR)
    run("start", NEAR)
    run("wait", NEAR, "--for", "in-sync", "--timeout", WAIT)
    run("verify", NEAR)  # fails if the sides differ
    say("verified")
    writer = DeviceWriter(f"/dev/mapper/{NEAR}", first=first_of(round_))
    while True:
        answered = writer.answered
        # The open point may have been cut before the last of these writes; the next one was not.
        words = ("--for", "point", "--newer-than", str(newest_point() + 1))
        run("wait", NEAR, *words, "--timeout", WAIT)
        say(f"durable {answered}")


if __name__ == "__main__":
    main()
