"""Load by libnbd: `/usr/bin/python3 libnbd_load.py URI MODE REQUESTS SEED`, as its bindings allow.

Each of several connections has a thread and a part of the volume to itself, whose content it knows.
`synch` sends one request and waits; `aio` keeps up to 24 in flight, on places that do not overlap.
Whatever is read is compared; at the end everything is, on another connection than wrote it.
Imports nothing but libnbd: it runs under the interpreter of the distribution.
"""

import random
import sys
import threading

import nbd

BLOCK = 4096
CONNECTIONS = 4
IN_FLIGHT = 24
LONGEST_BLOCKS = 32


class Part:
    """One thread's share of the volume and what it has to hold."""

    def __init__(self, uri: str, number: int, length: int, seed: int) -> None:
        self.handle = nbd.NBD()
        self.handle.connect_uri(uri)
        self.start = number * length
        self.content = bytearray(self.handle.pread(length, self.start))
        self.chance = random.Random(seed * CONNECTIONS + number)
        self.busy: set[int] = set()
        self.error: BaseException | None = None

    def place(self) -> tuple[int, int]:
        """Offset in the part and length of blocks that no request is under way for."""
        while True:
            length = self.chance.randrange(1, LONGEST_BLOCKS + 1)
            first = self.chance.randrange(len(self.content) // BLOCK - length + 1)
            if self.busy.isdisjoint(range(first, first + length)):
                return first * BLOCK, length * BLOCK

    def expect(self, offset: int, data: bytes | bytearray) -> None:
        if data != self.content[offset : offset + len(data)]:
            raise ValueError(f"{len(data)} bytes at {self.start + offset} are not what was written")

    def synch(self, requests: int) -> None:
        handle, chance, content = self.handle, self.chance, self.content
        for number in range(requests):
            offset, length = self.place()
            kind = chance.randrange(8)
            if kind < 3:
                self.expect(offset, handle.pread(length, self.start + offset))
            elif kind < 7:
                data = chance.randbytes(length)
                handle.pwrite(data, self.start + offset, nbd.CMD_FLAG_FUA if kind == 6 else 0)
                content[offset : offset + length] = data
            else:
                handle.zero(length, self.start + offset)
                content[offset : offset + length] = bytes(length)
            if number % 100 == 99:
                handle.flush()

    def aio(self, requests: int) -> None:
        handle, chance = self.handle, self.chance
        # Cookie to offset, buffer, and what was written, if it was a write.
        pending: dict[int, tuple[int, nbd.Buffer, bytes | None]] = {}
        begun = 0
        while begun < requests or pending:
            while begun < requests and len(pending) < IN_FLIGHT:
                offset, length = self.place()
                self.busy.update(range(offset // BLOCK, (offset + length) // BLOCK))
                begun += 1
                if chance.random() < 0.4:
                    buffer = nbd.Buffer(length)
                    cookie = handle.aio_pread(buffer, self.start + offset)
                    pending[cookie] = (offset, buffer, None)
                else:
                    data = chance.randbytes(length)
                    buffer = nbd.Buffer.from_bytearray(bytearray(data))
                    cookie = handle.aio_pwrite(buffer, self.start + offset)
                    pending[cookie] = (offset, buffer, data)
            handle.poll(-1)
            for cookie in [one for one in pending if handle.aio_command_completed(one)]:
                offset, buffer, data = pending.pop(cookie)
                self.busy.difference_update(range(offset // BLOCK, (offset + len(buffer)) // BLOCK))
                if data is None:
                    self.expect(offset, buffer.to_bytearray())
                else:
                    self.content[offset : offset + len(data)] = data

    def run(self, mode: str, requests: int) -> None:
        try:
            getattr(self, mode)(requests)
        except BaseException as error:  # noqa: BLE001  (raised by main)
            self.error = error


def main() -> None:
    uri, mode, requests, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    whole = nbd.NBD()
    whole.connect_uri(uri)
    length = whole.get_size() // CONNECTIONS // BLOCK * BLOCK
    parts = [Part(uri, number, length, seed) for number in range(CONNECTIONS)]
    threads = [threading.Thread(target=part.run, args=(mode, requests)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for part in parts:
        if part.error is not None:
            raise part.error
    parts[0].handle.flush()
    for part in parts:
        for at in range(0, length, 1 << 20):
            piece = min(1 << 20, length - at)
            part.expect(at, whole.pread(piece, part.start + at))
    print(f"{CONNECTIONS * requests} requests")


main()
