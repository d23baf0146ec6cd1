"""`dmctl verify`: finds what should not differ, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.nbdpeers import nbdkit, need
from tests.support.served import served_volume
from tests.support.volumes import KIB, MIB, Volume, make_file, noise

SIZE = 32 * MIB
SKIP = ["--initial-sync", "skip", "--era-interval", "100ms"]


def end_equal(volume: Volume) -> None:
    volume.wait_in_sync()
    volume.stop()
    assert volume.recorded() == set()
    assert volume.differing() == set()


def tamper(path: Path, offset_bytes: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset_bytes)
        file.write(data)


def test_case_36_a_disk_that_lied_is_found_out_and_healed(short_path: Path) -> None:
    """The server confirms flushes that it does not make, and is killed.

    What was copied lately would give it away; here nobody remembers that, as on another host.
    """
    backing = make_file(short_path / "far", SIZE)
    with (
        nbdkit(short_path, "--filter=cache", "file", f"file={backing}", "cache=unsafe") as server,
        served_volume(short_path, SIZE, server, backing, SKIP) as volume,
    ):
        volume.create()
        volume.start()
        volume.write(4 * MIB, noise(1, 3 * MIB))
        volume.write(20 * MIB + 8 * KIB, noise(2, 4 * KIB))
        volume.wait_in_sync()
        volume.stop()
        server.kill()
        assert volume.differing() == {4, 5, 6, 20}, "the server was to lose everything"
        server.start()
        for note in (short_path / "etc" / "state").glob("*.sides"):
            note.unlink()
        volume.start()
        assert volume.ask("status")["state"] == "in-sync"
        expected = 3 * MIB + 64 * KIB
        with volume.events() as events:
            done = volume.dmctl_process("--json", "verify", volume.name)
            assert done.returncode == 101
            found = json.loads(done.stdout)
            assert found["error"]["exit_status"] == 101
            assert found["unexpected_bytes"] == expected
            assert found["repaired_bytes"] == 0
            assert found["compared_bytes"] == SIZE
            runs = {tuple(run) for run in found["unexpected"]}
            assert (20 * MIB, 64 * KIB) in runs
            assert sum(length for _, length in runs) == expected
            told = events.wait("unexpected-difference")
        assert "outside the record" in told["message"]
        assert volume.ask("status")["last_error"]["code"] == "unexpected-difference"
        assert volume.status()["state"] == "in-sync", "verify changes nothing unless told to"
        assert volume.differing() == {4, 5, 6, 20}
        repaired = json.loads(volume.dmctl("--json", "verify", volume.name, "--repair"))
        assert repaired["repaired_bytes"] == repaired["unexpected_bytes"] == expected
        again = json.loads(volume.dmctl("--json", "verify", volume.name))
        assert again["unexpected_bytes"] == 0
        volume.stop()


def test_case_36_what_somebody_wrote_to_the_secondary_is_healed(short_path: Path) -> None:
    with Volume(short_path, SIZE, options=SKIP) as volume:
        volume.create()
        volume.start()
        volume.write(0, noise(1, 2 * MIB))
        volume.wait_in_sync()
        for place in (MIB, 9 * MIB + 1, SIZE - 1):
            tamper(volume.secondary, place, b"x")
        assert volume.refused("verify", volume.name)["exit_status"] == 101
        volume.dmctl("verify", volume.name, "--repair")
        volume.dmctl("verify", volume.name)
        end_equal(volume)


@pytest.mark.timeout(180)
def test_verify_of_a_volume_under_load_finds_nothing_and_what_is_there(short_path: Path) -> None:
    """Hosts write and the copier copies meanwhile; one block at rest was tampered with."""
    need("fio")
    with Volume(short_path, SIZE, options=SKIP) as volume:
        volume.create()
        volume.start()
        volume.write(30 * MIB, noise(1, MIB))
        volume.wait_in_sync()
        load = [
            *("fio", "--name=load", "--ioengine=nbd", f"--uri={volume.uri}", "--thread=1"),
            *("--rw=randwrite", "--bs=4k-64k", "--size=24m", "--iodepth=8", "--rate=20m"),
            *("--time_based=1", "--runtime=120", "--fsync=32"),
        ]
        job = subprocess.Popen(
            load, cwd=short_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            volume.until(lambda status: status["writes_total"] > 200)
            for _ in range(4):
                found = json.loads(volume.dmctl("--json", "verify", volume.name))
                assert found["compared_bytes"] == SIZE
                assert found["unexpected_bytes"] == 0
            tamper(volume.secondary, 30 * MIB + 99, b"tampered")
            error = volume.refused("verify", volume.name)
            assert "65536 bytes differ" in error["message"]
            volume.dmctl("pause", volume.name)
            volume.dmctl("resume", volume.name)
            assert job.poll() is None, "the load was to go on all the time"
        finally:
            job.kill()
            job.wait()
        volume.wait_in_sync()
        repaired = json.loads(volume.dmctl("--json", "verify", volume.name, "--repair"))
        assert repaired["repaired_bytes"] == 64 * KIB
        end_equal(volume)


def test_a_second_verify_is_refused_and_a_stop_ends_one(short_path: Path) -> None:
    backing = make_file(short_path / "far", SIZE)
    slow = ["--filter=delay", "file", f"file={backing}", "rdelay=2"]
    with (
        nbdkit(short_path, *slow) as server,
        Volume(
            short_path,
            SIZE,
            options=["--initial-sync", "full", *SKIP[2:]],
            secondary_target=str(server.uri()),
            media={"secondary": backing},
        ) as volume,
    ):
        volume.create()
        volume.start()
        volume.wait_in_sync()
        with volume.control() as verifying:
            verifying.send("verify")
            assert verifying.line()["event"]["progress"] < 1
            assert volume.refused("verify", volume.name)["exit_status"] == 12
            volume.stop()
            while "error" not in (answer := verifying.line()):
                pass
            assert answer["error"]["exit_status"] == 14
        assert volume.recorded() == set()


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_a_side_that_was_cut_off_is_named_and_the_rest_compared(
    short_path: Path, role: str
) -> None:
    with Volume(short_path, SIZE, options=SKIP) as volume:
        volume.create()
        volume.start()
        medium = {"primary": volume.primary, "secondary": volume.secondary}[role]
        os.truncate(medium, 8 * MIB)
        cut = {"side": role, "offset_bytes": 8 * MIB, "length_bytes": SIZE - 8 * MIB}
        done = volume.dmctl_process("--json", "verify", volume.name)
        found = json.loads(done.stdout)
        assert (done.returncode, found["error"]["exit_status"]) == (1, 1)
        assert f"{SIZE - 8 * MIB} bytes could not be read" in found["error"]["message"]
        assert found["unreadable"] == [cut]
        assert found["unreadable_bytes"] == SIZE - 8 * MIB
        assert (found["compared_bytes"], found["unexpected_bytes"]) == (8 * MIB, 0)
        tamper(volume.secondary, 3 * MIB, b"x")
        done = volume.dmctl_process("verify", volume.name)
        assert done.returncode == 101
        assert "could not be read" in done.stderr
        assert f"bytes at byte {8 * MIB} of the {role}" in done.stdout
        with volume.events() as events:
            told = events.wait("verify-error")
        assert told["device"] == str(medium)
        os.truncate(medium, SIZE)


@pytest.mark.timeout(120)
def test_a_difference_behind_a_bad_sector_is_found(short_path: Path) -> None:
    """The server cannot read one place; there are differences before and behind it."""
    backing = make_file(short_path / "far", SIZE)
    bad = 9 * MIB + 64 * KIB  # where create looks at no sample
    spotted = [
        f"get_size=echo {SIZE}",
        f"pread=if [ $4 -lt {bad + 4 * KIB} ] && [ $(($4 + $3)) -gt {bad} ]; then"
        " echo 'EIO bad sector' >&2; exit 1; fi;"
        f" dd if={backing} bs=64k iflag=fullblock,skip_bytes,count_bytes skip=$4 count=$3",
        "can_write=exit 0",
        "can_flush=exit 0",
        f"pwrite=dd of={backing} bs=64k iflag=fullblock oflag=seek_bytes seek=$4 conv=notrunc",
        f"flush=sync {backing}",
    ]
    with (
        nbdkit(short_path, "eval", *spotted) as server,
        served_volume(short_path, SIZE, server, backing, SKIP) as volume,
    ):
        volume.create()
        volume.start()
        for place in (4 * MIB, 20 * MIB):
            tamper(backing, place, b"x")
        done = volume.dmctl_process("--json", "verify", volume.name)
        assert done.returncode == 101
        found = json.loads(done.stdout)
        assert found["unexpected"] == [[4 * MIB, 64 * KIB], [20 * MIB, 64 * KIB]]
        assert found["unreadable"] == [
            {"side": "secondary", "offset_bytes": bad, "length_bytes": 64 * KIB}
        ]
        assert volume.ask("status")["state"] == "in-sync", "the connection is as good as before"
