"""What ends the process as a crash would, and what does not; in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time

import pytest

WAIT_S = 60.0

BEGIN = """
import asyncio, os, signal, sys, threading, time
from bitmapd import lastresort
from bitmapd.errors import BitmapdError
from bitmapd.lastresort import LastResort, Signals

def tell(error, trace):
    print(error.code, error.message, trace.strip().splitlines()[-1:], flush=True)

last = LastResort(tell, lambda error: print("pauses", error, flush=True))
threading.excepthook = last.on_thread
"""


class Program:
    def __init__(self, body: str) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-c", BEGIN + textwrap.dedent(body)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self._popen.stdout is not None
        return self._popen.stdout.readline().strip()

    def send(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def ended(self) -> tuple[int, str]:
        """The exit status, and the rest of what it said."""
        try:
            said, errors = self._popen.communicate(timeout=WAIT_S)
        finally:
            self._popen.kill()
        assert not errors, errors
        return self._popen.returncode, said


def on_a_loop(body: str) -> Program:
    head = """
async def main():
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(last.on_loop)
"""
    return Program(
        head + textwrap.indent(textwrap.dedent(body), "    ") + "\nasyncio.run(main())\n"
    )


@pytest.mark.parametrize(
    "begins",
    [
        "loop.call_soon(lambda: {}[7])",
        "loop.call_later(0.01, lambda: {}[7])",
        "loop.run_in_executor(None, threading.Thread(target=lambda: {}[7]).start)",
    ],
    ids=["callback", "timer", "thread"],
)
def test_an_exception_that_nobody_answers_ends_the_process(begins: str) -> None:
    program = on_a_loop(f"{begins}\nawait asyncio.sleep(60)\nprint('went on')")
    status, said = program.ended()
    assert status == 1
    assert said == "failed a mistake of the program: KeyError: 7 ['KeyError: 7']\n"


def test_so_does_a_task_that_nobody_asks() -> None:
    program = on_a_loop(
        """
        async def fails():
            raise MemoryError
        task = asyncio.create_task(fails())
        del task
        await asyncio.sleep(60)
        """
    )
    assert program.ended() == (1, "failed out of memory ['MemoryError:']\n")


def test_a_descriptor_that_a_client_cannot_be_given_ends_nothing(short_path: object) -> None:
    program = on_a_loop(
        f"""
        import resource
        path = {str(short_path)!r} + "/s"
        connected = asyncio.Event()
        await asyncio.start_unix_server(lambda *_: connected.set(), path)
        client, wakes = __import__("socket").socket(__import__("socket").AF_UNIX), os.dup(0)
        highest = os.dup(0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, 4096))
        os.close(wakes)
        first = os.dup(0)
        client.connect(path)
        await asyncio.sleep(0.1)
        os.close(first)
        await connected.wait()
        print("served", flush=True)
        """
    )
    status, said = program.ended()
    assert status == 0
    assert said.splitlines()[-1] == "served"
    assert said.startswith("pauses [Errno 24]")


def test_the_loss_of_a_clients_connection_ends_nothing() -> None:
    program = on_a_loop(
        """
        loop.call_exception_handler({"exception": OSError(104, "reset"), "transport": None})
        loop.set_exception_handler(last.on_loop)
        print("went on", flush=True)
        """
    )
    assert program.ended() == (0, "went on\n")


@pytest.mark.parametrize("ends", ["transport.abort()", "theirs.close(); transport.write(b'x')"])
def test_a_connection_that_asyncio_ends_twice_ends_nothing(ends: str) -> None:
    """As its own TLS does: it writes in `resume_writing`, to somebody who has gone."""
    program = on_a_loop(
        f"""
        import socket
        ours, theirs = socket.socketpair()

        class Ends(asyncio.Protocol):
            def resume_writing(self):
                {ends}
            def connection_lost(self, error):
                print("lost", flush=True)

        transport, _ = await loop.create_connection(Ends, sock=ours)
        transport.set_write_buffer_limits(high=0)
        while not transport.get_write_buffer_size():
            transport.write(bytes(1 << 10))
        theirs.recv(1 << 20)
        await asyncio.sleep(0.1)
        print("went on", flush=True)
        """
    )
    assert program.ended() == (0, "lost\nwent on\n")


def test_an_error_of_a_protocol_that_hears_of_its_end_is_not_taken_for_that() -> None:
    program = on_a_loop(
        """
        import socket

        class Fails(asyncio.Protocol):
            def connection_lost(self, error):
                None.close()

        transport, _ = await loop.create_connection(Fails, sock=socket.socketpair()[0])
        await asyncio.sleep(60)
        """
    )
    status, said = program.ended()
    assert status == 1
    assert "'NoneType' object has no attribute 'close'" in said


def test_last_words_that_take_too_long_are_cut_short() -> None:
    program = Program(
        """
        lastresort.LAST_WORDS_S = 0.1
        LastResort(lambda *_: time.sleep(60), print).end(BitmapdError("x"))
        """
    )
    assert program.ended() == (-signal.SIGALRM, "")


def test_last_words_that_fail_do_not_keep_it_alive() -> None:
    program = Program(
        """
        def fails(error, trace):
            raise MemoryError
        LastResort(fails, print).end(BitmapdError("x"))
        """
    )
    assert program.ended() == (1, "")


STOPPING = """
def stop():
    print("asked", flush=True)
{extra}
signals = Signals(loop, {{signal.SIGTERM: stop, signal.SIGHUP: lambda: print("again", flush=True)}},
                  last, timeout_s=0.3)
print("ready", flush=True)
{then}
"""


@pytest.mark.parametrize(
    ("then", "heard"),
    [("await asyncio.sleep(60)", "asked\n"), ("os.read(os.pipe()[0], 1)", "")],
    ids=["a loop that turns", "a loop that waits for a medium"],
)
def test_a_stop_that_does_not_end_is_ended(then: str, heard: str) -> None:
    program = on_a_loop(STOPPING.format(extra="", then=then))
    assert program.line() == "ready"
    program.send(signal.SIGTERM)
    status, said = program.ended()
    assert status == 40
    assert said == heard + "time-out the stop did not end the process in 0.3 s []\n"


def test_other_signals_are_heard_and_end_nothing() -> None:
    program = on_a_loop(
        "ended = loop.create_future()\n"
        + STOPPING.format(extra="    ended.set_result(None)", then="await ended")
    )
    assert program.line() == "ready"
    program.send(signal.SIGHUP)
    assert program.line() == "again"
    program.send(signal.SIGTERM)
    assert program.ended() == (0, "asked\n")


def test_a_stop_that_is_refused_has_no_deadline() -> None:
    program = on_a_loop(
        "asked = []\n"
        + STOPPING.format(
            extra="    asked.append(1)\n    signals.refused()\n    if len(asked) == 2:"
            "\n        os._exit(0)",
            then="await asyncio.sleep(60)",
        )
    )
    assert program.line() == "ready"
    program.send(signal.SIGTERM)
    assert program.line() == "asked"
    time.sleep(0.6)  # twice the deadline: that nothing happens has no event
    program.send(signal.SIGTERM)
    assert program.ended() == (0, "asked\n")
