"""A volume and the keeper of its record on one machine, made as an administrator makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.volumes import MIB, Volume, make_file


class Kept:
    """`folder` must have a short path: unix sockets live in it.  `options`: of node 1; `words`: of
    the keeper.  Each node has a configuration and a run directory of its own."""

    def __init__(
        self,
        folder: Path,
        size_bytes: int = 64 * MIB,
        options: tuple[str, ...] = (),
        words: tuple[str, ...] = (),
    ) -> None:
        self.folder, self.size_bytes = folder, size_bytes
        self.primary, self.secondary = (
            make_file(folder / name, size_bytes) for name in ("primary", "secondary")
        )
        self._options = options
        self._machines = 0
        self.nodes: list[Volume] = []
        self.host = self.another_host()
        self.keeper = self._node("keeper", {}, self._link(2))
        self.keeper_command = [
            "create", "vol0", "--record", str(self.keeper.media["record"]), *self._link(2),
            "--partner-role", "keeper", "--size", str(size_bytes), *words,
        ]  # fmt: skip

    def _link(self, number: int) -> list[str]:
        return [
            "--node", str(number),
            "--partner", f"unix://{self.folder}/p{3 - number}",
            "--partner-listen", f"unix://{self.folder}/p{number}",
        ]  # fmt: skip

    def _node(self, name: str, media: dict[str, Path], options: list[str]) -> Volume:
        home = self.folder / name
        home.mkdir()
        record = make_file(home / "record", MIB)
        node = Volume(home, self.size_bytes, options=options, media={**media, "record": record})
        self.nodes.append(node)
        return node

    def another_host(self) -> Volume:
        """A machine that reaches the same primary and secondary, with a record of its own."""
        self._machines += 1
        media = {"primary": self.primary, "secondary": self.secondary}
        return self._node(f"m{self._machines}", media, [*self._link(1), *self._options])

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.destroy()

    def create(self) -> None:
        self.host.dmctl(*self.host.create_command())
        self.keeper.dmctl(*self.keeper_command)

    def start(self) -> None:
        for node in (self.host, self.keeper):
            node.start()
        self.paired()

    def paired(self) -> None:
        for node in (self.host, self.keeper):
            self.until(node, "paired")

    def until(self, node: Volume, state: str) -> dict[str, Any]:
        """`partner` of its status once the state is there."""
        node.until(lambda status: status["partner"]["state"] == state)
        return self.partner(node)

    def partner(self, node: Volume) -> dict[str, Any]:
        return dict(node.status()["partner"])

    def superblock(self, node: Volume) -> dict[str, Any]:
        """What its stored record says of the pair."""
        dump = json.loads(node.dmctl("--json", "record", "dump", str(node.media["record"])))
        return dict(dump["superblock"]["pair"])

    def equal(self) -> bool:
        return self.primary.read_bytes() == self.secondary.read_bytes()
