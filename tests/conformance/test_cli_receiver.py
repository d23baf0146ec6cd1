"""A receiver as an administrator has it: made, started, fed, killed, looked at, removed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bitmapd.peer.frames import ErrorCode
from bitmapd.peer.words import Error
from tests.support.cli import MIB, Cli, check_status, new_cli
from tests.support.faulty import small_filesystem
from tests.support.livesender import LiveSender
from tests.support.loops import loop_device
from tests.support.simreceiver import GEOMETRY

LIMIT_S = 60


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    with new_cli(tmp_path) as made:
        yield made


def sparse(cli: Cli, name: str, size_bytes: int) -> str:
    path = cli.folder / name
    with path.open("wb") as stream:
        stream.truncate(size_bytes)
    return str(path)


def listen(cli: Cli, name: str = "vol0") -> str:
    return f"receiver+unix:///{name}?socket={cli.paths.run_dir}/{name}.points"


def receive(cli: Cli, *options: str, **media: str) -> Any:
    values = {
        "image": media.get("image") or sparse(cli, "image", MIB),
        "journal": media.get("journal") or sparse(cli, "journal", 64 * MIB),
        "listen": media.get("listen", listen(cli)),
    }
    words = [word for key, value in values.items() for word in (f"--{key}", value)]
    return cli.call("receive", "vol0", *words, *options)


@pytest.fixture
def started(cli: Cli) -> Cli:
    assert receive(cli).status == 0
    cli.ok("start", "vol0")
    return cli


def live(work: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            await work

    asyncio.run(limited())


def image(cli: Cli) -> bytes:
    return (cli.folder / "image").read_bytes()[: GEOMETRY.size_bytes]


def figures(cli: Cli) -> dict[str, Any]:
    found = cli.status()
    check_status(found)
    receiver: dict[str, Any] = found["receiver"]
    return receiver


# -- from receive to remove -----------------------------------------------------------------------


def test_a_receiver_from_its_making_to_its_end(cli: Cli) -> None:
    outcome = receive(cli)
    assert outcome.status == 0, outcome
    assert "dmctl start vol0" in outcome.err
    assert cli.status()["state"] == "stopped"
    assert figures(cli)["consistent"] == "never"
    assert cli.ok("points", "vol0", "--json").json["points"] == []
    assert "no point yet" in cli.ok("points", "vol0").err
    cli.ok("start", "vol0")
    assert cli.ok("start", "vol0", "--json").json["volumes"][0]["result"] == "running"
    assert cli.status()["state"] == "receiving"
    assert cli.call("status", "vol0", "--check").status == 0
    cli.ok("wait", "vol0", "--for", "started", "--timeout", "10s")

    async def points() -> None:
        sender = LiveSender(listen(cli))
        for number in (1, 2, 3):
            assert await sender.point() == number
            for _ in range(3):
                sender.script.write()
        sender.close()
        self_said.append(sender.script.points[sender.script.incarnation, 3])

    self_said: list[bytes] = []
    live(points())
    cli.ok("stop", "vol0")
    assert image(cli) == self_said[0]
    assert cli.status()["state"] == "stopped"
    found = cli.ok("points", "vol0", "--json").json["points"]
    assert [(point["point"], point["state"]) for point in found] == [(3, "applied")]
    assert found[0]["at"].startswith("2026-01-01T00:00:00")
    assert figures(cli)["consistent"] == "yes"
    assert cli.call("remove", "vol0").status == 2  # nobody is there to say yes
    cli.ok("remove", "vol0", "--yes")
    assert image(cli) == self_said[0]
    assert cli.call("status", "vol0").status == 10


def test_the_listing_shows_what_it_holds(started: Cli) -> None:
    async def one() -> None:
        sender = LiveSender(listen(started))
        await sender.point()
        sender.close()

    live(one())
    assert "POINT" in started.ok("points", "vol0").out
    assert "point 1" in started.ok("status", "vol0").out
    events = started.ok("events", "vol0", "--now").out.splitlines()
    assert any("sender-connected" in line for line in events)
    assert any("point-committed" in line for line in events)


def test_what_was_killed_has_the_last_point_and_takes_up_the_open_one(started: Cli) -> None:
    async def work() -> None:
        sender = LiveSender(listen(started))
        script = sender.script
        await sender.point()
        for _ in range(5):
            script.write()
        await sender.greeted()
        while script.send(1):
            pass
        sent = script.sent_entries
        await asyncio.to_thread(started.kill)
        await sender.until(lambda: sender.losses)
        outcome = await asyncio.to_thread(started.run, "start", "vol0")
        assert outcome.status == 0, outcome
        assert await sender.point() == 2
        script.write()
        assert await sender.point() == 3
        assert script.sent_entries >= sent
        wanted.append(bytes(script.content))
        sender.close()

    wanted: list[bytes] = []
    live(work())
    started.ok("stop", "vol0")
    assert image(started) == wanted[0]


def test_a_stop_at_once_leaves_what_is_committed_for_the_next_start(started: Cli) -> None:
    async def one() -> None:
        sender = LiveSender(listen(started))
        await sender.point()
        sender.script.write()
        await sender.point()
        wanted.append(bytes(sender.script.content))
        outcome = await asyncio.to_thread(started.run, "stop", "vol0", "--now")
        assert outcome.status == 0, outcome
        sender.close()

    wanted: list[bytes] = []
    live(one())
    started.ok("start", "vol0")
    started.ok("stop", "vol0")
    assert image(started) == wanted[0]
    assert figures(started)["committed"] == figures(started)["applied"] == 2


def test_a_signal_ends_it(started: Cli) -> None:
    pid = started.pid()
    os.kill(pid, signal.SIGTERM)
    started.ok("wait", "vol0", "--for", "stopped", "--timeout", "20s")


@pytest.mark.parametrize("sector_bytes", [512, 4096])
def test_devices_are_held_exclusively(cli: Cli, sector_bytes: int) -> None:
    with ExitStack() as stack:
        image_device, journal_device = (
            stack.enter_context(loop_device(Path(sparse(cli, name, size_bytes)), sector_bytes))
            for name, size_bytes in (("i", MIB), ("j", 64 * MIB))
        )
        stack.callback(cli.call, "stop", "vol0", "--now")
        outcome = receive(cli, image=image_device, journal=journal_device)
        assert outcome.status == 0, outcome
        cli.ok("start", "vol0")
        for device in (image_device, journal_device):
            with pytest.raises(OSError, match="busy"):
                os.close(os.open(device, os.O_RDWR | os.O_EXCL))

        async def one() -> None:
            sender = LiveSender(listen(cli))
            if sector_bytes == 512:
                assert await sender.point() == 1
                assert await sender.point() == 2
                wanted.append(bytes(sender.script.content))
            else:  # the volume is no multiple of 4 KiB
                await sender.until(lambda: sender.losses)
            sender.close()

        wanted: list[bytes] = []
        live(one())
        cli.ok("stop", "vol0")
        with open(image_device, "rb") as stream:
            found = stream.read(GEOMETRY.size_bytes)
        assert found == (wanted[0] if wanted else bytes(GEOMETRY.size_bytes))
        os.close(os.open(image_device, os.O_RDWR | os.O_EXCL))


def test_a_journal_that_refuses_something_ends_the_process_and_nothing_is_lost(cli: Cli) -> None:
    small = cli.folder / "small"
    small.mkdir()
    with small_filesystem(small, 1):
        journal = small / "journal"
        with journal.open("wb") as stream:
            stream.truncate(64 * MIB)
        assert receive(cli, journal=str(journal)).status == 0
        cli.ok("start", "vol0")

        async def work() -> None:
            sender = LiveSender(listen(cli))
            script = sender.script
            await sender.point()
            wanted.append(bytes(script.content))
            with pytest.raises(OSError, match="No space"):
                (small / "ballast").write_bytes(bytes(2 * MIB))
            script.write()
            script.send(4)
            await sender.until(lambda: sender.losses)
            stopped = await asyncio.to_thread(
                cli.run, "wait", "vol0", "--for", "stopped", "--timeout", "20s"
            )
            assert stopped.status == 0, stopped
            status = await asyncio.to_thread(cli.status)
            assert (status["state"], status["last_error"]["code"]) == ("stopped", "no-space")
            assert image(cli) == wanted[0]
            (small / "ballast").unlink()
            started = await asyncio.to_thread(cli.run, "start", "vol0")
            assert started.status == 0, started
            assert await sender.point() == 2
            wanted.append(bytes(script.content))
            sender.close()

        wanted: list[bytes] = []
        live(work())
        cli.ok("stop", "vol0")
        assert image(cli) == wanted[1]
        cli.clean_up()  # while the file system is still there


# -- TLS ------------------------------------------------------------------------------------------


def test_over_tls_only_the_sender_with_its_key_comes_in(cli: Cli) -> None:
    keys = cli.folder / "keys"
    cli.ok("partner-keys", str(keys), "--names", "here,there")
    folders = sorted(path for path in keys.iterdir() if path.is_dir())
    assert len(folders) == 2
    ours, theirs = folders
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    uri = f"receiver+tls://127.0.0.1:{port}/vol0"
    refused = receive(cli, listen=uri)
    assert refused.status == 2
    assert "certificates" in refused.err
    assert "sender_name" in refused.err or "sender-name" in refused.err
    outcome = receive(cli, "--certificates", str(ours), "--sender-name", "there", listen=uri)
    assert outcome.status == 0, outcome
    cli.ok("start", "vol0")

    async def work() -> None:
        stranger = LiveSender(uri, ours, "here")
        await stranger.until(lambda: stranger.failures or stranger.losses)
        stranger.close()
        sender = LiveSender(uri, theirs, "here")
        assert await sender.point() == 1
        sender.close()

    live(work())
    assert figures(cli)["committed"] == 1


# -- what is refused ------------------------------------------------------------------------------


def refusal(outcome: Any, status: int, *words: str) -> None:
    assert outcome.status == status, outcome
    for word in words:
        assert word in outcome.err, outcome


def test_media_that_do_not_fit_are_refused_and_untouched(cli: Cli) -> None:
    small = sparse(cli, "small", 32 * MIB)
    refusal(receive(cli, journal=small), 13, "journal", "truncate -s")
    refusal(receive(cli, image=sparse(cli, "tiny", 4096)), 13, "one extent")
    refusal(receive(cli, image=str(cli.folder / "none")), 10, "image")
    one = sparse(cli, "one", 64 * MIB)
    refusal(receive(cli, image=one, journal=one), 2, "same")
    os.chmod(one, 0o400)
    if os.geteuid():
        refusal(receive(cli, journal=one), 30)
    assert not cli.paths.volume_file("vol0").exists()
    assert stat.S_ISREG(os.stat(small).st_mode)
    assert not any((cli.folder / "small").read_bytes())


def test_what_holds_something_is_overwritten_only_by_force(cli: Cli) -> None:
    journal = sparse(cli, "journal", 64 * MIB)
    held = sparse(cli, "image", MIB)
    for path in (journal, held):
        with open(path, "r+b") as stream:
            stream.write(b"LUKS\xba\xbe")
    refusal(receive(cli, image=held, journal=journal), 11, "image", "journal", "LUKS", "--force")
    assert receive(cli, "--force", image=held, journal=journal).status == 0
    cli.ok("start", "vol0")

    async def one() -> None:
        sender = LiveSender(listen(cli))
        await sender.point()
        sender.close()

    live(one())
    cli.ok("stop", "vol0")
    cli.ok("remove", "vol0", "--yes")
    again = {"image": str(cli.folder / "image"), "journal": journal}
    refusal(receive(cli, **again), 22, "earlier receiver 'vol0'", "--force")
    record = ("create", "vol1", "--primary", cli.medium("p"), "--secondary", cli.medium("s"))
    refusal(cli.call(*record, "--record", journal), 11, "journal of a receiver")
    assert receive(cli, "--force", **again).status == 0
    cli.paths.volume_file("vol0").unlink()
    assert receive(cli, **again).status == 0  # as after a crash before it was configured


def test_what_another_uses_is_refused(started: Cli) -> None:
    journal, held = str(started.folder / "journal"), str(started.folder / "image")
    fresh = sparse(started, "fresh", 64 * MIB)
    for media in ({"image": held, "journal": fresh}, {"image": fresh, "journal": journal}):
        words = [word for key, value in media.items() for word in (f"--{key}", value)]
        outcome = started.call("receive", "two", *words, "--listen", listen(started, "two"))
        refusal(outcome, 12, "vol0")
    outcome = started.call(
        *("create", "vol1", "--primary", started.medium("p"), "--secondary", held),
        *("--record", started.medium("r", MIB)),
    )
    refusal(outcome, 12, "vol0")


def test_names_and_addresses_are_checked(cli: Cli) -> None:
    refusal(receive(cli, listen="tls://host"), 2, "--listen")
    refusal(receive(cli, listen=listen(cli, "other")), 2, "other")
    assert receive(cli).status == 0
    refusal(receive(cli), 11, "exists")
    cli.paths.volume_file("vol0").write_text('role = "receiver"\nimage = "/x"\njurnal = "/y"\n')
    refusal(cli.call("config", "check"), 2, "jurnal", "journal", "listen")


def test_verbs_of_volumes_are_refused_with_a_word_of_what_there_is(started: Cli) -> None:
    for words in (("pause", "vol0"), ("resize", "vol0"), ("set", "vol0", "copy-rate=1MiB")):
        refusal(started.call(*words), 14, "receiver")
    refusal(started.call("point", "vol0"), 14, "receiver")
    refusal(started.call("wait", "vol0", "--for", "in-sync", "--timeout", "5s"), 14, "receiver")
    assert cli_keys(started) == {"role", "image", "journal", "listen"}
    refusal(started.call("set", "vol0", "retain=3 x 1h"), 14, "when it starts", "vol0.toml")
    assert "0 volumes, 1 receiver" in started.ok("config", "check").err
    assert started.ok("config", "check", "--json").json["receivers"] == ["vol0"]
    started.create("vol1")
    refusal(started.call("points", "vol1"), 14, "volume")


def test_what_is_done_to_all_volumes_passes_receivers_over_or_starts_them(started: Cli) -> None:
    started.ok("resync", "--all")
    started.ok("stop", "vol0")
    started.ok("resync", "--all")
    (started.folder / "image").rename(started.folder / "elsewhere")
    assert "waits for its image" in started.ok("assemble", "--all").err
    (started.folder / "elsewhere").rename(started.folder / "image")
    started.ok("assemble", "--all")
    assert started.status()["state"] == "receiving"
    started.ok("stop", "--all")
    started.ok("start", "--all")
    started.ok("assemble", "vol0", "--wait")


def cli_keys(cli: Cli) -> set[str]:
    volume = cli.ok("config", "show", "vol0", "--json").json["volumes"][0]
    return set(volume["values"])


def test_a_dry_run_changes_nothing(cli: Cli) -> None:
    outcome = receive(cli, "--dry-run", "--json")
    assert outcome.status == 0
    assert outcome.json["receiver"]["image_bytes"] == MIB
    assert "image" in receive(cli, "--dry-run").out
    assert not cli.paths.volume_file("vol0").exists()
    assert not any((cli.folder / "journal").read_bytes())


def test_an_image_that_was_exchanged_is_refused(started: Cli) -> None:
    started.ok("stop", "vol0")
    (started.folder / "image").unlink()
    sparse(started, "image", MIB)
    refusal(started.call("start", "vol0"), 22, "belongs to the image")


def test_a_sender_of_another_volume_is_refused(started: Cli) -> None:
    async def work() -> None:
        sender = LiveSender(listen(started))
        await sender.point()
        sender.close()
        other = LiveSender(listen(started))
        hello = other.script.hello
        other.script.hello = lambda **_: hello(volume=bytes([1] * 16))  # type: ignore[method-assign]
        await other.until(lambda: other.losses)
        found = [message for message in other.got if isinstance(message, Error)]
        assert [error.code for error in found] == [ErrorCode.OTHER]
        other.close()

    live(work())
    assert started.status()["last_error"]["code"] == "sender-refused"
    assert figures(started)["committed"] == 1
