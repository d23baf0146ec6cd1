"""Two appliances on one machine, made as an administrator makes them: primary and secondary are the
same files or devices, each node has a record, a configuration and a run directory of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.volumes import MIB, Volume, make_file


class Pair:
    """`folder` must have a short path: unix sockets live in it.  `media`: devices to use as primary
    and secondary, in the place of files of that size."""

    def __init__(
        self,
        folder: Path,
        size_bytes: int = 64 * MIB,
        *options: str,
        media: tuple[Path, Path] | None = None,
    ) -> None:
        self.folder = folder
        self.primary, self.secondary = media or (
            make_file(folder / name, size_bytes) for name in ("primary", "secondary")
        )
        self.nodes = {number: self._node(number, size_bytes, options) for number in (1, 2)}

    def _node(self, number: int, size_bytes: int, options: tuple[str, ...]) -> Volume:
        home = self.folder / f"n{number}"
        home.mkdir()
        media = {
            "primary": self.primary,
            "secondary": self.secondary,
            "record": make_file(home / "record", MIB),
        }
        link = [
            "--node", str(number),
            "--partner", f"unix://{self.folder}/p{3 - number}",
            "--partner-listen", f"unix://{self.folder}/p{number}",
            *options,
        ]  # fmt: skip
        return Volume(home, size_bytes, options=link, media=dict(media))

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.destroy()

    def destroy(self) -> None:
        for node in self.nodes.values():
            node.destroy()

    def create(self) -> None:
        for node in self.nodes.values():
            node.dmctl(*node.create_command())

    def start(self) -> None:
        """Both, until they are paired."""
        for node in self.nodes.values():
            node.start()
        for number in self.nodes:
            self.until(number, "paired")

    def until(self, number: int, state: str) -> dict[str, Any]:
        """What `dmctl partner` says once the state is there."""
        try:
            self[number].until(lambda status: status["partner"]["state"] == state)
        except AssertionError as error:
            error.add_note(f"the other node: {self[3 - number].status()}")
            raise
        return self.partner(number)

    def partner(self, number: int) -> dict[str, Any]:
        status = self.nodes[number].status()
        return dict(status["partner"])

    def __getitem__(self, number: int) -> Volume:
        return self.nodes[number]

    def equal(self) -> bool:
        """Whether both sides hold the same bytes now."""
        return self.primary.read_bytes() == self.secondary.read_bytes()
