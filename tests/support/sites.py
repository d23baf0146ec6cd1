"""Two sites on one machine, made as an administrator makes them: a volume, and its receiver.

`near` was created as the volume, `far` as the receiver; `promote` and `failback` change that.
`Writer` is a host that writes numbered pieces, each to a place that follows from its number: so any
image says which of them it has, and whether that is a prefix of what was written.
"""

from __future__ import annotations

import struct
import threading
from pathlib import Path
from typing import Any

from tests.support import rawnbd
from tests.support.volumes import MIB, Volume, make_file

PIECE = 4096
STEP = 7919  # a prime: the pieces go all over the slots


class Sites:
    """`folder` must have a short path: unix sockets live in it."""

    def __init__(
        self,
        folder: Path,
        size_bytes: int = 64 * MIB,
        *options: str,
        listen: str | None = None,
        secondary: str | None = None,
        far_options: tuple[str, ...] = (),
        near_options: tuple[str, ...] = (),
        journal_bytes: int = 80 * MIB,
    ) -> None:
        self.folder = folder
        self.size_bytes = size_bytes
        for name in ("near", "far"):
            (folder / name).mkdir()
        self.uri = f"receiver+unix:///vol0?socket={folder}/link"
        self.listen, self.secondary = listen or self.uri, secondary or self.uri
        self.far_options = far_options
        more = ["--point-interval", "300ms", *near_options, *options]
        self.near = Volume(
            folder / "near", size_bytes, secondary_target=self.secondary, options=more
        )
        self.near.secondary = folder / "near" / "unused"  # there is no second medium here
        self.far = Volume(folder / "far", size_bytes)
        self.image = self.far.primary
        self.journal = make_file(folder / "far" / "journal", journal_bytes)
        self.near_journal = make_file(folder / "near" / "journal", journal_bytes)

    def __enter__(self) -> Sites:
        return self

    def __exit__(self, *_: object) -> None:
        self.near.destroy()
        self.far.destroy()

    def create(self) -> None:
        make_file(self.image, self.size_bytes)
        self.far.dmctl(
            "receive", "vol0", "--image", str(self.image), "--journal", str(self.journal),
            "--listen", self.listen, *self.far_options,
        )  # fmt: skip
        self.near.create()

    def start(self) -> None:
        """Both, until there is a first point."""
        self.far.start()
        self.near.start()
        self.point(0)

    def point(self, newer_than: int, site: Volume | None = None) -> None:
        """A point newer than that."""
        words = ("wait", "vol0", "--for", "point", "--newer-than", str(newer_than))
        (site or self.near).dmctl(*words, "--timeout", "60s")

    def points(self) -> dict[str, Any]:
        """What the volume says of them."""
        points: dict[str, Any] = self.near.status()["points"]
        return points

    def equal(self) -> bool:
        return self.near.primary.read_bytes() == self.image.read_bytes()


class Writer:
    """A host that goes on until it is stopped, or its volume dies."""

    def __init__(self, volume: Volume, slots: int = 2000, first: int = 1) -> None:
        self.answered = first - 1  # the number of the last write that was answered
        self.slots = slots
        self._stop = threading.Event()
        self._reached = threading.Condition()
        self._host = volume.host()
        self._thread = threading.Thread(target=self._run, args=(first,))
        self._thread.start()

    def _run(self, number: int) -> None:
        try:
            while not self._stop.is_set():
                place = number * STEP % self.slots * PIECE
                self._host.call(rawnbd.WRITE, place, PIECE, content(number))
                with self._reached:
                    self.answered = number
                    self._reached.notify_all()
                number += 1
        except (OSError, EOFError):
            with self._reached:
                self._stop.set()
                self._reached.notify_all()

    def until(self, number: int) -> None:
        """So many writes were answered."""
        with self._reached:
            reached = self._reached.wait_for(
                lambda: self.answered >= number or self._stop.is_set(), timeout=60
            )
        assert reached
        assert self.answered >= number, "the volume died"

    def more(self, count: int) -> None:
        self.until(self.answered + count)

    def stop(self) -> int:
        """The last number that was answered."""
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._host.__exit__(None, None, None)
        return self.answered


def content(number: int) -> bytes:
    return struct.pack(">Q", number) * (PIECE // 8)


def newest(image: Path, slots: int = 2000) -> int:
    """The number up to which an image has all writes and none of later; AssertionError if there is
    none."""
    with image.open("rb") as file:
        found = []
        for _ in range(slots):
            piece = file.read(PIECE)
            (number,) = struct.unpack(">Q", piece[:8])
            assert piece == content(number), f"a torn piece: {number}"
            found.append(number)
    last = max(found)
    for number in range(max(1, last - slots + 1), last + 1):
        slot = number * STEP % slots
        assert found[slot] == number, f"{last} is there, and {number} is not: {found[slot]}"
    return last


__all__ = ["PIECE", "Sites", "Writer", "content", "newest"]
