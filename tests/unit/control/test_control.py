"""The control socket: real sockets, one server on a loop, clients in threads."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from bitmapd.control.client import ControlClient, EndedError, SilentError, ask
from bitmapd.control.events import EventLog
from bitmapd.control.notify import notify
from bitmapd.control.protocol import MAX_LINE_BYTES, Event, encode_result
from bitmapd.control.server import (
    ControlServer,
    Handler,
    Progress,
    events_handler,
)
from bitmapd.errors import (
    BitmapdError,
    BusyError,
    ExistsError,
    PermissionError_,
    TimeOutError,
    UsageError,
    WrongStateError,
)
from bitmapd.net.sockets import listen_unix, peer_credentials


@pytest.fixture
def path() -> Iterator[Path]:
    """A socket's place; pytest's own folders can be too long for one."""
    with tempfile.TemporaryDirectory(prefix="ctl") as folder:
        yield Path(folder) / "v.ctl"


async def echo(args: dict[str, Any], progress: Progress) -> Any:
    for step in range(int(args.get("steps", 0))):
        await progress({"step": step})
    return args


async def busy(_args: dict[str, Any], _progress: Progress) -> Any:
    raise BusyError("somebody is there", hint="come back later")


async def broken_disk(_args: dict[str, Any], _progress: Progress) -> Any:
    raise OSError(5, "Input/output error")


async def too_much(_args: dict[str, Any], _progress: Progress) -> Any:
    return "x" * MAX_LINE_BYTES


async def forever(_args: dict[str, Any], _progress: Progress) -> Any:
    await asyncio.Event().wait()


HANDLERS: dict[str, Handler] = {
    "echo": echo,
    "busy": busy,
    "broken-disk": broken_disk,
    "too-much": too_much,
    "forever": forever,
}


@contextlib.asynccontextmanager
async def serving(
    path: Path, handlers: dict[str, Handler] | None = None, **options: Any
) -> AsyncIterator[ControlServer]:
    server = ControlServer(path, handlers or HANDLERS, **options)
    await server.start()
    try:
        yield server
    finally:
        await server.close(0.1)


def call(path: Path, verb: str, args: dict[str, Any] | None = None, **options: Any) -> Any:
    with ControlClient(path, "v") as client:
        return client.call(verb, args, **options)


def raw(path: Path, data: bytes, *, half_close: bool = False) -> bytes:
    """What the server sends to a client that sends just these bytes."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(str(path))
        sock.sendall(data)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
        return answer


def test_results_events_and_several_requests_on_one_connection(path: Path) -> None:
    def client_side() -> None:
        events: list[dict[str, Any]] = []
        with ControlClient(path, "v") as client:
            assert client.call("echo", {"steps": 2}, on_event=events.append) == {"steps": 2}
            assert events == [{"step": 0}, {"step": 1}]
            assert client.call("echo", {"steps": 1, "a": [None, 1.5]}) == {
                "steps": 1,
                "a": [None, 1.5],
            }

    async def main() -> None:
        async with serving(path):
            await asyncio.to_thread(client_side)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("verb", "kind", "message"),
    [
        ("busy", BusyError, "somebody is there"),
        ("broken-disk", BitmapdError, "^volume 'v': Input/output error$"),
        ("too-much", BitmapdError, "longer than"),
        ("no-such-verb", UsageError, "unknown verb 'no-such-verb'"),
    ],
)
def test_errors_arrive_with_their_class_and_the_connection_goes_on(
    path: Path, verb: str, kind: type[BitmapdError], message: str
) -> None:
    def client_side() -> None:
        with ControlClient(path, "v") as client:
            with pytest.raises(kind, match=message) as caught:
                client.call(verb)
            if verb == "busy":
                assert caught.value.hint == "come back later"
            assert client.call("echo") == {}

    async def main() -> None:
        async with serving(path):
            await asyncio.to_thread(client_side)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"nonsense\n", "not JSON"),
        (b"x" * (MAX_LINE_BYTES + 1), "longer than"),
        (b'{"verb": "forever"}\n{"verb": "echo"}\n', "before the one before it"),
    ],
)
def test_a_client_that_breaks_the_rules_is_told_and_dropped(
    path: Path, data: bytes, message: str
) -> None:
    async def main() -> bytes:
        async with serving(path):
            return await asyncio.to_thread(raw, path, data)

    answer = json.loads(asyncio.run(main()))
    assert answer["error"]["exit_status"] == 2
    assert message in answer["error"]["message"]


@pytest.mark.parametrize(
    ("data", "bound"), [(b'{"verb": ', "request_timeout_s"), (b"", "idle_timeout_s")]
)
def test_half_a_request_and_none_end_with_their_deadlines(
    path: Path, data: bytes, bound: str
) -> None:
    async def main() -> bytes:
        async with serving(path, **{bound: 0.05}):
            return await asyncio.to_thread(raw, path, data)

    assert asyncio.run(main()) == b""


def test_an_empty_line_is_no_request(path: Path) -> None:
    async def main() -> bytes:
        async with serving(path):
            return await asyncio.to_thread(raw, path, b"\n")

    assert json.loads(asyncio.run(main()))["error"]["exit_status"] == 2


def test_a_client_that_goes_away_cancels_its_handler(path: Path) -> None:
    async def main() -> None:
        started, cancelled = asyncio.Event(), asyncio.Event()

        async def work(_args: dict[str, Any], _progress: Progress) -> Any:
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        async with serving(path, {"work": work}):
            with ControlClient(path, "v") as client:
                client.send("work")
                await asyncio.wait_for(started.wait(), 5)
            await asyncio.wait_for(cancelled.wait(), 5)

    asyncio.run(main())


def test_a_client_that_does_not_read_is_dropped(path: Path) -> None:
    async def main() -> None:
        ended = asyncio.Event()

        async def flood(_args: dict[str, Any], progress: Progress) -> Any:
            try:
                while True:
                    await progress({"data": "x" * 60_000})
            finally:
                ended.set()

        async with serving(path, {"flood": flood}, send_timeout_s=0.05):
            with ControlClient(path, "v") as client:
                client.send("flood")
                await asyncio.wait_for(ended.wait(), 5)

    asyncio.run(main())


def test_a_mistake_in_a_handler_ends_the_connection_and_is_reported(path: Path) -> None:
    async def main() -> tuple[bytes, list[Any]]:
        reports: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, what: reports.append(what))

        async def wrong(_args: dict[str, Any], _progress: Progress) -> Any:
            raise KeyError("mistake")

        async with serving(path, {"wrong": wrong, "echo": echo}):
            answer = await asyncio.to_thread(raw, path, b'{"verb": "wrong"}\n')
            assert await asyncio.to_thread(call, path, "echo") == {}
        return answer, reports

    answer, reports = asyncio.run(main())
    assert answer == b""
    assert [type(report["exception"]) for report in reports] == [KeyError]


def test_an_answer_that_is_not_taken_ends_the_connection(path: Path) -> None:
    """However little of it the kernel has no room for: it stays in no buffer of ours."""

    asked = asyncio.Event()

    async def chatty(_args: dict[str, Any], progress: Progress) -> Any:
        asked.set()
        for _ in range(4):  # the kernel takes about three and a half
            await progress({"data": "x" * 60_000})

    async def main() -> None:
        async with serving(path, {"chatty": chatty}, send_timeout_s=0.05) as server:
            with ControlClient(path, "v") as client:
                client.send("chatty")
                await asked.wait()
                while server._connections:
                    await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(main(), 10))


def test_connections_that_ask_for_nothing_keep_nobody_out(path: Path) -> None:
    def client_side() -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(ControlClient(path, "v"))
            assert call(path, "echo") == {}
            last = stack.enter_context(ControlClient(path, "v"))
            assert last.call("echo") == {}

    async def main() -> None:
        async with serving(path):
            await asyncio.to_thread(client_side)

    asyncio.run(main())


def test_commands_that_wait_leave_places_for_status_and_stop(path: Path) -> None:
    waiting = asyncio.Event()

    async def forever(_args: dict[str, Any], progress: Progress) -> Any:
        await progress({})
        await waiting.wait()

    def client_side() -> None:
        with contextlib.ExitStack() as stack:

            def ask(verb: str) -> ControlClient:
                client = stack.enter_context(ControlClient(path, "v"))
                client.send(verb)
                client.receive()  # it is at work, or refused
                return client

            for _ in range(40):
                ask("wait")
            with pytest.raises(BusyError, match="32 commands wait at the control socket"):
                call(path, "events")
            for _ in range(20):
                ask("stop")
            with pytest.raises(BusyError, match="16 commands wait for the stop"):
                call(path, "stop")
            for _ in range(100):
                assert call(path, "status") == call(path, "ping") == {}

    handlers = {"wait": forever, "events": forever, "stop": forever, "status": echo, "ping": echo}

    async def main() -> None:
        async with serving(path, handlers):
            await asyncio.to_thread(client_side)

    asyncio.run(main())


def test_another_user_is_refused(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    python = shutil.which("python3", path="/usr/bin")
    if python is None:
        pytest.skip("the system has no /usr/bin/python3 that another user may run")
    script = (
        "import os, socket, sys\n"
        "os.setuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "s.connect(sys.argv[1])\n"
        "sys.stdout.buffer.write(s.recv(65536))\n"
    )

    async def main() -> bytes:
        async with serving(path):
            # The mode keeps others out already; open it to see the second line of defence.
            path.chmod(0o666)
            path.parent.chmod(0o711)
            process = await asyncio.create_subprocess_exec(
                python, "-c", script, str(path), stdout=asyncio.subprocess.PIPE
            )
            return (await process.communicate())[0]

    answer = json.loads(asyncio.run(main()))
    assert answer["error"]["code"] == PermissionError_.code


def test_the_socket_is_private_and_goes_with_the_server(path: Path) -> None:
    async def main() -> None:
        async with serving(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            with ControlClient(path, "v") as client:
                assert peer_credentials(client.socket) == (os.getpid(), os.geteuid())
        assert not path.exists()

    asyncio.run(main())


def test_a_stale_socket_is_replaced_a_live_one_is_not(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))

    async def main() -> None:
        async with serving(path):
            with pytest.raises(BusyError):
                listen_unix(path)
            assert await asyncio.to_thread(call, path, "echo") == {}

    asyncio.run(main())
    path.write_text("not a socket")
    with pytest.raises(ExistsError):
        listen_unix(path)


def test_a_server_that_is_too_busy_to_answer_is_there_all_the_same(path: Path) -> None:
    listener = listen_unix(path, 0o660, backlog=0)
    with listener.sock, socket.socket(socket.AF_UNIX) as client:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        client.connect(str(path))  # nobody accepts it, so nobody else gets in
        with pytest.raises(BusyError):
            listen_unix(path)
        listener.unlink()
        assert not path.exists()
        listener.unlink()


def test_a_place_where_no_socket_can_be_is_named(path: Path) -> None:
    with pytest.raises(BitmapdError, match=r"cannot listen on .*/no/s: No such file"):
        listen_unix(path.parent / "no" / "s")


def test_a_successors_socket_is_left_alone(path: Path) -> None:
    async def main() -> None:
        async with serving(path):
            path.unlink()
            listen_unix(path).sock.close()
        assert path.exists()

    asyncio.run(main())


def test_close_lets_answers_under_way_finish_and_ends_the_rest(path: Path) -> None:
    async def main() -> None:
        begun, finish = asyncio.Event(), asyncio.Event()

        async def slow(_args: dict[str, Any], _progress: Progress) -> Any:
            begun.set()
            await finish.wait()
            return "done"

        server = ControlServer(path, {"slow": slow, **HANDLERS})
        await server.start()
        idle = ControlClient(path, "v")
        stuck = ControlClient(path, "v")
        stuck.send("forever")
        answer = asyncio.ensure_future(asyncio.to_thread(call, path, "slow"))
        await begun.wait()
        closing = asyncio.ensure_future(server.close(0.2))
        await asyncio.sleep(0)
        finish.set()
        assert await answer == "done"
        await closing
        for client in (idle, stuck):
            assert await asyncio.to_thread(client.receive) is None
            client.close()

    asyncio.run(main())


def test_a_server_that_never_started_closes(path: Path) -> None:
    asyncio.run(ControlServer(path, {}).close())


def test_a_volume_that_does_not_run(path: Path) -> None:
    with pytest.raises(WrongStateError, match="'v' is not running") as caught:
        ControlClient(path, "v")
    assert "dmctl start v" in str(caught.value.hint)
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    with pytest.raises(WrongStateError):
        ControlClient(path, "v")


def test_a_socket_that_may_not_be_used(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may use every socket")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        path.chmod(0)
        with pytest.raises(PermissionError_):
            ControlClient(path, "v")


def test_a_path_that_is_too_long_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(BitmapdError, match="cannot connect"):
        ControlClient(tmp_path / ("x" * 120), "v")


def test_a_full_queue_of_connections_is_waited_for(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock, contextlib.ExitStack() as stack:
        sock.bind(str(path))
        sock.listen(0)
        stack.enter_context(ControlClient(path, "v"))
        with pytest.raises(SilentError, match="accept a connection"):
            ControlClient(path, "v", 0.05)

        def accept() -> None:
            stack.enter_context(sock.accept()[0])

        timer = threading.Timer(0.1, accept)
        timer.start()
        stack.enter_context(ControlClient(path, "v"))
        timer.join()


def test_a_server_that_hangs_times_out(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen(1)
        with ControlClient(path, "v") as client, pytest.raises(TimeOutError, match="answer"):
            client.call("echo", timeout_s=0.05)


def test_a_call_that_is_to_end_in_time_does_so_while_events_come(path: Path) -> None:
    async def lively(_args: dict[str, Any], progress: Progress) -> Any:
        while True:
            await progress({})
            await asyncio.sleep(0.01)

    def client_side() -> None:
        for within_s in (0.0, 0.1):
            with ControlClient(path, "v") as client, pytest.raises(TimeOutError) as caught:
                client.call("lively", within_s=within_s)
            assert not isinstance(caught.value, SilentError), "it is at work"
        with ControlClient(path, "v") as client, pytest.raises(TimeOutError) as caught:
            client.call("forever", timeout_s=10, within_s=0.05)
        assert not isinstance(caught.value, SilentError), "it had not been silent for long"
        with ControlClient(path, "v") as client, pytest.raises(SilentError, match="answer"):
            client.call("forever", timeout_s=0.05, within_s=10)

    async def main() -> None:
        async with serving(path, {"lively": lively, "forever": forever}):
            await asyncio.to_thread(client_side)

    asyncio.run(main())


def test_a_server_that_dies_without_an_answer(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen(1)
        with ControlClient(path, "v") as client:
            sock.accept()[0].close()
            with pytest.raises(BitmapdError, match="without an answer"):
                client.call("echo")


def test_a_question_to_a_server_that_ends_then_learns_what_is_there_now(path: Path) -> None:
    def ends(times: int, then: bytes) -> threading.Thread:
        def serve() -> None:
            for _ in range(times):
                connection, _ = sock.accept()
                connection.recv(1 << 16)
                connection.close()
            if then:
                connection, _ = sock.accept()
                connection.recv(1 << 16)
                connection.sendall(then)
                connection.close()
            else:
                sock.close()

        sock = socket.socket(socket.AF_UNIX)
        path.unlink(missing_ok=True)
        sock.bind(str(path))
        sock.listen(1)
        thread = threading.Thread(target=serve)
        thread.start()
        return thread

    thread = ends(1, encode_result("the next one"))
    assert ask(path, "v", "status", timeout_s=5) == "the next one"
    thread.join()
    thread = ends(2, b"")
    with pytest.raises(EndedError, match="without an answer"):
        ask(path, "v", "status", timeout_s=5)
    thread.join()
    with pytest.raises(WrongStateError, match="not running"):
        ask(path, "v", "status", timeout_s=5)


def test_events_of_the_past_and_then_those_that_come(path: Path) -> None:
    log = EventLog("v", wall_clock=lambda: 0.0, clock=lambda: 0.0)
    log.emit("started")

    async def main() -> None:
        async with serving(path, {"events": events_handler(log)}):
            seen: list[dict[str, Any]] = []
            result = await asyncio.to_thread(
                call, path, "events", {"now": True}, on_event=seen.append
            )
            assert result == {"events": 1}
            assert [entry["event"] for entry in seen] == ["started"]
            with ControlClient(path, "v") as client:
                client.send("events")
                names: list[Any] = []
                while len(names) < 2:
                    for answer in await asyncio.to_thread(client.receive) or []:
                        assert isinstance(answer, Event)
                        names.append(answer.fields["event"])
                    if names == ["started"]:
                        log.emit("in-sync")
                assert names == ["started", "in-sync"]

    asyncio.run(main())


def test_events_that_come_too_fast_are_counted(path: Path) -> None:
    log = EventLog("v", wall_clock=lambda: 0.0, clock=lambda: 0.0, capacity=1)

    async def main() -> None:
        got: list[dict[str, Any]] = []
        lost = asyncio.Event()

        async def progress(fields: Any) -> None:
            got.append(dict(fields))
            if fields["event"] == "events-lost":
                lost.set()

        log.emit("first")
        following = asyncio.ensure_future(events_handler(log)({}, progress))
        while not got:
            await asyncio.sleep(0)
        for _ in range(1500):
            log.emit("flood")
        await asyncio.wait_for(lost.wait(), 5)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        assert got[-1] == {"event": "events-lost", "count": 1500 - (len(got) - 2)}

    asyncio.run(main())


def test_notify(path: Path) -> None:
    assert notify("READY=1", {}) is False
    assert notify("READY=1", {"NOTIFY_SOCKET": "vsock:2:1"}) is False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        assert notify("READY=1\nSTATUS=in sync", {"NOTIFY_SOCKET": str(path)}) is True
        assert manager.recv(100) == b"READY=1\nSTATUS=in sync"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        name = f"dmctl-test-{os.getpid()}"
        manager.bind("\0" + name)
        assert notify("STOPPING=1", {"NOTIFY_SOCKET": "@" + name}) is True
        assert manager.recv(100) == b"STOPPING=1"
    with pytest.raises(OSError, match=r"No such file|refused"):
        notify("READY=1", {"NOTIFY_SOCKET": str(path) + ".absent"})


def test_the_client_needs_no_event_loop() -> None:
    """The command line starts quickly because it does not import asyncio."""
    code = "import sys, bitmapd.control.client; sys.exit('asyncio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
