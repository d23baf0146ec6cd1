"""`make install` into a folder of its own, and what systemd and udev say of what it installs."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from bitmapd.config import Paths, create_volume, load_any
from dmctl.kernel import systemd

ROOT = Path(__file__).parents[2]
PREFIX = "/opt/here"
PROGRAMS = ("bitmapd", "dmctl")


def make(target: str, stage: Path, prefix: str = PREFIX) -> str:
    # What the tests themselves run from is not made anew under them, and one at a time builds.
    words = ["make", "-o", ".venv/.ready", "-C", str(ROOT), target]
    with open(ROOT / ".venv/.install-test", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            [*words, f"DESTDIR={stage}", f"PREFIX={prefix}"],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    if "No matching distribution" in done.stderr or "Temporary failure" in done.stderr:
        pytest.skip(f"NEEDS a package index that pip can reach: {done.stderr[-200:]}")
    assert done.returncode == 0, done
    return done.stdout


def listing(stage: Path) -> dict[str, int]:
    """What is there but the programs' own environment, with permissions."""
    return {
        str(path.relative_to(stage)): stat.S_IMODE(path.lstat().st_mode)
        for path in sorted(stage.rglob("*"))
        if "lib/dmctl/" not in str(path) and not path.is_dir()
    }


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One installation for all tests of this file, whichever worker runs them: it takes a while."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    made = folder / "stage"
    with open(folder / "stage.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            make("install", folder / "stage.new")
            (folder / "stage.new").rename(made)
    return made


def test_everything_is_where_the_manual_says(stage: Path) -> None:
    share, lib = f"{PREFIX[1:]}/share", f"{PREFIX[1:]}/lib"
    wanted = {
        *(f"{PREFIX[1:]}/bin/{name}" for name in PROGRAMS),
        *(f"{lib}/udev/rules.d/{path.name}" for path in (ROOT / "udev").glob("*.rules")),
        *(f"{lib}/systemd/system/{path.name}" for path in (ROOT / "examples").glob("*.service")),
        f"{lib}/systemd/system/dmctl-resync.timer",
        f"{lib}/modules-load.d/dmctl.conf",
        "usr/lib/ocf/resource.d/dmctl/volume",
        f"{PREFIX[1:]}/bin/dmctl-fence-pacemaker",
        f"{share}/man/man8/dmctl.8",
        f"{share}/man/man8/bitmapd.8",
        f"{share}/man/man5/dmctl.toml.5",
        f"{share}/man/man7/dmctl-events.7",
        f"{share}/bash-completion/completions/dmctl",
        f"{share}/zsh/site-functions/_dmctl",
        *(f"{share}/doc/dmctl/examples/{name}" for name in
          ("dmctl-resync.cron", "dmctl.toml", "example.toml")),
        *(f"{share}/doc/dmctl/{path.relative_to(ROOT)}"
          for folder in ("docs", "docs/decisions") for path in (ROOT / folder).glob("*.md")),
    }  # fmt: skip
    found = listing(stage)
    assert f"{share}/doc/dmctl/docs/recovery.md" in wanted  # as hints name it
    assert set(found) == wanted
    programs = {name for name in found if "/bin/" in name or "/ocf/" in name}
    assert {found[name] for name in found.keys() - programs} == {0o644}
    for name in ("usr/lib/ocf/resource.d/dmctl/volume", f"{PREFIX[1:]}/bin/dmctl-fence-pacemaker"):
        assert found[name] == 0o755
    assert (stage / "etc/dmctl/volumes").is_dir()
    manual = (ROOT / "docs/boot.md").read_text()
    for name in wanted:
        if "/share/" not in name:
            assert Path(name).name in manual or Path(name).suffix == ".service", name


def test_no_file_names_the_stage_or_another_prefix(stage: Path) -> None:
    for name in listing(stage):
        path = stage / name
        if not path.is_symlink():
            text = path.read_text()
            assert str(stage) not in text, name
            assert "/usr/local/" not in text or "cron" in name, name
    for name in PROGRAMS:
        link = stage / PREFIX[1:] / "bin" / name
        assert os.readlink(link) == f"{PREFIX}/lib/dmctl/bin/{name}"
        script = (stage / PREFIX[1:] / "lib/dmctl/bin" / name).read_text()
        assert script.startswith(f"#!{PREFIX}/lib/dmctl/bin/python")
    assert str(stage) not in (stage / PREFIX[1:] / "lib/dmctl/pyvenv.cfg").read_text()


def test_the_installed_program_runs_without_the_checkout(stage: Path, tmp_path: Path) -> None:
    python = stage / PREFIX[1:] / "lib/dmctl/bin/python"
    code = "import bitmapd, dmctl; print(bitmapd.__file__, dmctl.__file__)"
    said = subprocess.run(
        [python, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    assert said.count(str(stage)) == 2
    for module in ("dmctl", "bitmapd.daemon"):
        subprocess.run(
            [python, "-P", "-m", module, "--version"], check=True, cwd=tmp_path, timeout=60
        )


def test_installing_again_changes_nothing_and_removing_leaves_the_configuration(
    stage: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(stage, copy, symlinks=True)
    volume = copy / "etc/dmctl/volumes/vol0.toml"
    volume.write_text("kept")
    before = {name: (copy / name).read_bytes() for name in listing(copy)
              if not (copy / name).is_symlink()}  # fmt: skip
    make("install", copy)
    assert {name: (copy / name).read_bytes() for name in before} == before
    assert set(listing(copy)) - {"etc/dmctl/volumes/vol0.toml"} == set(listing(stage))
    make("uninstall", copy)
    assert set(listing(copy)) == {"etc/dmctl/volumes/vol0.toml"}
    assert not (copy / PREFIX[1:] / "lib/dmctl").exists()
    make("uninstall", copy)


def test_a_prefix_that_is_not_absolute_is_refused(tmp_path: Path) -> None:
    words = ["sh", str(ROOT / "tools/install.sh")]
    environment = {**os.environ, "PREFIX": "usr", "DESTDIR": str(tmp_path)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "PREFIX=usr is not an absolute path" in done.stderr
    assert list(tmp_path.iterdir()) == []


VOLUME = {
    "uuid": "0a9e5c39-53b6-4ef4-8fb6-e7a0b5ec7d10",
    "primary": "/dev/p",
    "secondary": "/srv/a b%c/s",
    "record": "/dev/r",
}
RECEIVER = {
    "role": "receiver",
    "image": "/srv/a b%c/i",
    "journal": "/dev/j",
    "listen": "receiver+unix:///vol0?socket=/run/vol0.points",
}
DROP_INS = (VOLUME, VOLUME | {"secondary": "/dev/s", "attach": "dm"}, RECEIVER)

# -- systemd ----------------------------------------------------------------------------------


def units(tmp_path: Path) -> list[Path]:
    """The units as they are installed, of programs that exist."""
    made = []
    for path in sorted(
        [*(ROOT / "examples").glob("*.service"), ROOT / "examples/dmctl-resync.timer"]
    ):
        text = path.read_text()
        for program in PROGRAMS:
            text = text.replace(f"/usr/local/bin/{program}", "/bin/true")
        made.append(tmp_path / path.name.replace("@.", "@vol0."))
        made[-1].write_text(text)
    return made


def verified(files: list[Path]) -> list[str]:
    """What systemd says of them."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("NEEDS systemd-analyze (package systemd): the units were not looked at")
    words = [program, "verify", "--man=no", "--recursive-errors=no", *map(str, files)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    names = [file.name for file in files]
    said = [line for line in done.stderr.splitlines() if any(name in line for name in names)]
    assert bool(done.returncode) == bool(said), done.stderr
    return said


def test_systemd_accepts_every_unit(tmp_path: Path) -> None:
    assert verified(units(tmp_path)) == []


@pytest.mark.parametrize("table", DROP_INS)
def test_systemd_accepts_what_is_written_for_a_volume_or_receiver(
    table: dict[str, str], tmp_path: Path
) -> None:
    paths = Paths(tmp_path / "etc", tmp_path / "run")
    create_volume(paths, "vol0", table)
    text = systemd.drop_in(load_any(paths, "vol0"))
    folder = tmp_path / "bitmapd@vol0.service.d"
    folder.mkdir()
    (folder / systemd.DROP_IN_NAME).write_text(text)
    files = units(tmp_path)
    assert verified(files) == []
    (folder / systemd.DROP_IN_NAME).write_text(f"{text}Frobnicate=yes\n")
    assert any("Frobnicate" in line for line in verified(files)), "it was not read"


def test_a_mistake_in_a_unit_is_seen(tmp_path: Path) -> None:
    """The test above can fail."""
    files = units(tmp_path)
    files[0].write_text(files[0].read_text() + "Frobnicate=yes\n")
    assert any("Frobnicate" in line for line in verified(files))


def test_a_volume_is_never_killed_for_memory_or_for_not_stopping() -> None:
    text = (ROOT / "examples/bitmapd@.service").read_text()
    for line in (
        *("OOMScoreAdjust=-1000", "LimitMEMLOCK=infinity", "StartLimitIntervalSec=0"),
        *("SendSIGKILL=no", "DefaultDependencies=no", "Conflicts=shutdown.target"),
        *("Before=shutdown.target", "Type=notify", "Restart=on-failure"),
    ):
        assert f"\n{line}\n" in text
    final = re.search(r"RestartPreventExitStatus=(.*)", text)
    assert final is not None
    from dmctl.model.assembly import FINAL_STATUSES

    assert {int(word) for word in final[1].split()} == FINAL_STATUSES
