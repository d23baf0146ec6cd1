"""A server whose device completes when the test says so, and its clients.

The same thread as the test never touches the server: everything goes through `call`.
"""

from __future__ import annotations

from typing import Any

from tests.support.nbdraw import RawClient
from tests.support.nbdserve import HeldDevice, ServerThread


class Served:
    def __init__(self, thread: ServerThread, path: str) -> None:
        self.thread = thread
        self.path = path
        self.device: HeldDevice = thread.device
        self.clients: list[RawClient] = []

    def client(self, *, enter: bool = True, **options: bool) -> RawClient:
        client = RawClient(self.path)
        self.clients.append(client)
        return client.enter(**options) if enter else client

    def hold(self) -> None:
        self.thread.call(lambda: setattr(self.device, "held", True))

    def release(self, count: int | None = None) -> None:
        """Let operations that are held complete; with no count, later ones too."""

        def work() -> None:
            self.device.held = count is not None
            self.device.release(count)

        self.thread.call(work)

    def release_all(self) -> None:
        """On the loop's thread."""
        self.device.held = False
        self.device.release()

    def wait_for(self, count: int) -> None:
        self.thread.until(lambda: len(self.device.waiting) == count)

    def waiting(self) -> list[str]:
        return self.thread.call(lambda: [what for what, _ in self.device.waiting])

    def connections(self) -> int:
        return self.thread.call(lambda: self.thread.server.stats.connections)

    def events(self, name: str) -> list[dict[str, Any]]:
        return [fields for event, fields in list(self.thread.events) if event == name]
