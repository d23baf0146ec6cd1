"""PostgreSQL on a volume, killed together with everything else; part of `make soak`.

Data base, bitmapd and what shows the export die by SIGKILL while clients are at work.  The volume
is started again and becomes in sync; the data base is started from the *secondary's* image: what
it had acknowledged is there, money adds up, and pg_amcheck finds nothing.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.filesystems import MAKE, Shown, mounted, need_filesystem
from tests.support.needs import lacks, need
from tests.support.volumes import MIB, Volume, run, wait_gone

SIZE = 512 * MIB
COMMITS = 200
AS_POSTGRES = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
# What clients of pgbench take from one account is in the history and at the branches, too.
MONEY = """
SELECT sums.taken = (SELECT sum(abalance) FROM pgbench_accounts)
   AND sums.taken = (SELECT sum(bbalance) FROM pgbench_branches)
   AND sums.taken = (SELECT sum(tbalance) FROM pgbench_tellers)
  FROM (SELECT coalesce(sum(delta), 0) AS taken FROM pgbench_history) AS sums
"""


class DataBase:
    """A cluster in `data`; clients come through the socket in `folder`."""

    def __init__(self, data: Path, folder: Path) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_amcheck"))
        if not found:
            lacks("postgresql, version 14 or newer")
        self._programs = found[-1].parent
        self._data = data
        self._folder = folder

    def command(self, program: str, *arguments: str) -> list[str]:
        return [*AS_POSTGRES, str(self._programs / program), *arguments]

    def client(self, program: str, *arguments: str) -> list[str]:
        return self.command(program, "-h", str(self._folder), *arguments)

    def create(self) -> None:
        self._data.mkdir()
        shutil.chown(self._data, "postgres", "postgres")
        run(self.command("initdb", "-A", "trust", "-D", str(self._data)))

    def start(self) -> int:
        """Process id of its first process."""
        options = f"-k {self._folder} -c listen_addresses="
        log = str(self._folder / "log")
        # As at another site.  The server that was killed may still have its number, as a zombie of
        # a first process that takes its time, or another process has that by now.
        for lock in (self._data / "postmaster.pid", self._folder / ".s.PGSQL.5432.lock"):
            lock.unlink(missing_ok=True)
        command = ["-D", str(self._data), "-l", log, "-o", options, "-w", "start"]
        # Output goes to a file: the server would keep a pipe open.
        subprocess.run(
            self.command("pg_ctl", *command), check=True, stdout=subprocess.DEVNULL, timeout=90
        )
        return int((self._data / "postmaster.pid").read_text().split()[0])

    def stop(self) -> None:
        run(self.command("pg_ctl", "-D", str(self._data), "-m", "fast", "-w", "stop"))

    def ask(self, query: str) -> str:
        return run(self.client("psql", "-qAt", "-c", query, "postgres")).strip()


@contextmanager
def program(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        bufsize=1,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def commit(client: subprocess.Popen[str], number: int) -> None:
    """Returns when the data base has acknowledged it."""
    if client.stdin is None or client.stdout is None:
        raise RuntimeError("the client has no pipes")
    client.stdin.write(f"INSERT INTO ledger VALUES ({number}) RETURNING id;\n")  # noqa: S608
    client.stdin.flush()
    assert client.stdout.readline() == f"{number}\n"


def end_all(volume: Volume, shown: Shown, postmaster: int) -> None:
    children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
    volume.kill()
    shown.end(signal.SIGKILL)
    for pid in (postmaster, *map(int, children)):
        with suppress(ProcessLookupError):  # some end with the first one
            os.kill(pid, signal.SIGKILL)
    for pid in (postmaster, *map(int, children)):
        wait_gone(pid)


def test_a_data_base_from_the_secondary(short_path: Path) -> None:
    need_filesystem("ext4")
    need("setpriv")
    short_path.chmod(0o755)
    sockets = short_path / "sockets"
    sockets.mkdir()
    sockets.chmod(0o777)
    options = ["--era-interval", "500ms", "--copy-rate", "60MiB"]
    with Volume(short_path, SIZE, options=options) as volume:
        volume.create("--initial-sync", "skip")
        volume.start()
        shown = Shown(volume)
        try:
            run([*MAKE["ext4"], str(shown.path)])
            with mounted(shown.path, short_path / "used", "ext4") as folder:
                base = DataBase(folder / "data", sockets)
                base.create()
                postmaster = base.start()
                base.ask("CREATE TABLE ledger (id int PRIMARY KEY); CREATE EXTENSION amcheck")
                run(base.client("pgbench", "-i", "-s", "3", "-q", "postgres"))
                with (
                    program(base.client("pgbench", "-c", "4", "-T", "600", "postgres")),
                    program(base.client("psql", "-qAt", "postgres")) as client,
                ):
                    for number in range(1, COMMITS + 1):
                        commit(client, number)
                    end_all(volume, shown, postmaster)
        finally:
            shown.end(signal.SIGKILL)
        volume.start()
        volume.wait_in_sync()
        volume.stop()
        assert volume.recorded() == set()
        assert volume.differing() == set()
        with mounted(volume.secondary, short_path / "found", "ext4") as folder:
            base = DataBase(folder / "data", sockets)
            base.start()
            try:
                assert base.ask("SELECT count(*), max(id) FROM ledger") == f"{COMMITS}|{COMMITS}"
                assert base.ask(MONEY) == "t"
                run(base.client("pg_amcheck", "--heapallindexed", "postgres"))
            finally:
                base.stop()
