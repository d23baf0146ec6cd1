"""kernel/lvm: what LVM takes for the physical volume that is on a volume."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmctl.kernel import lvm

NULL, ZERO = "1:3", "1:5"  # device numbers that every machine has


@pytest.fixture
def primary(tmp_path: Path) -> Path:
    path = tmp_path / "primary"
    path.write_bytes(bytes(512) + b"LABELONE" + bytes(8192 - 520))
    return path


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the place of LVM's, which notes that it was asked."""
    program = tmp_path / "lvm"
    asked = tmp_path / "asked"
    program.write_text(
        f'#!/bin/sh\necho "$@" > {asked}\n'
        'echo "  /dev/null "; echo "  /dev/zero"; echo "  /dev/no-such"; echo WARNING >&2\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return asked


def test_devices_below_the_volume_are_named(primary: Path, says: Path) -> None:
    assert lvm.taken_by_lvm(str(primary), {NULL, "8:0"}) == ["/dev/null"]
    assert says.read_text().split()[0] == "pvs"
    assert lvm.taken_by_lvm(str(primary), {NULL, ZERO}) == ["/dev/null", "/dev/zero"]
    assert lvm.taken_by_lvm(str(primary), {"8:0"}) == []


@pytest.mark.parametrize("at", [0, 512, 1024, 1536])
def test_a_label_is_found_where_it_may_stand(primary: Path, says: Path, at: int) -> None:
    primary.write_bytes(bytes(at) + b"LABELONE" + bytes(8192))
    assert lvm.taken_by_lvm(str(primary), {NULL}) == ["/dev/null"]


def test_without_a_label_nobody_is_asked(primary: Path, says: Path) -> None:
    primary.write_bytes(bytes(8192))
    assert lvm.taken_by_lvm(str(primary), {NULL}) == []
    assert not says.exists()


def test_a_machine_without_lvm(primary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lvm, "PROGRAM", "no-such-lvm")
    assert lvm.taken_by_lvm(str(primary), {NULL}) == []


def test_one_that_does_not_answer_is_not_waited_for(
    primary: Path, says: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (says.parent / "lvm").write_text("#!/bin/sh\nexec sleep 600\n")
    monkeypatch.setattr(lvm, "TIMEOUT_S", 0.1)
    assert lvm.taken_by_lvm(str(primary), {NULL}) == []
