"""`dmctl partner-keys`: what it makes, beside test_peer_transport, which uses it."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from bitmapd.errors import NotFoundError
from dmctl.cli.partnerkeys import make_partner_keys
from tests.support.needs import need

pytestmark = pytest.mark.usefixtures("openssl")


@pytest.fixture(scope="module")
def openssl() -> None:
    need("openssl")


def dmctl(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dmctl", *map(str, words)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_each_node_gets_its_three_files(tmp_path: Path) -> None:
    done = dmctl("partner-keys", tmp_path / "keys", "--names", "node-a,10.0.0.2", "--json")
    assert done.returncode == 0, done.stderr
    folders = json.loads(done.stdout)["folders"]
    assert folders == {name: str(tmp_path / "keys" / name) for name in ("node-a", "10.0.0.2")}
    assert sorted(tree(tmp_path / "keys")) == [
        f"{name}/{file}.pem"
        for name in ("10.0.0.2", "node-a")
        for file in ("ca-cert", "node-cert", "node-key")
    ]
    for key in (tmp_path / "keys").rglob("*-key.pem"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    for name, found in (("node-a", "DNS:node-a"), ("10.0.0.2", "IP Address:10.0.0.2")):
        node = tmp_path / "keys" / name
        text = subprocess.run(
            ["openssl", "x509", "-in", node / "node-cert.pem", "-noout", "-text"],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        assert found in text
        subprocess.run(
            ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile",
             node / "ca-cert.pem", node / "node-cert.pem"],
            check=True, capture_output=True,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == [tmp_path / "keys"]  # nothing is left beside it


def test_nothing_is_replaced(tmp_path: Path) -> None:
    assert dmctl("partner-keys", tmp_path / "keys", "--names", "a,b").returncode == 0
    before = tree(tmp_path)
    again = dmctl("partner-keys", tmp_path / "keys", "--names", "a,b")
    assert again.returncode == 11
    assert "nothing is replaced" in again.stderr
    (tmp_path / "file").write_text("mine")
    assert dmctl("partner-keys", tmp_path / "file", "--names", "a,b").returncode == 11
    (tmp_path / "file").unlink()
    assert tree(tmp_path) == before


def test_an_empty_folder_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    assert dmctl("partner-keys", tmp_path / "keys", "--names", "a,b").returncode == 0
    assert len(tree(tmp_path / "keys")) == 6


@pytest.mark.parametrize("names", ["a", "a,b,c", "a,A", "a,", "a,../b", "a b,c"])
def test_two_different_names_are_needed(tmp_path: Path, names: str) -> None:
    done = dmctl("partner-keys", tmp_path / "keys", "--names", names)
    assert done.returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    done = dmctl("partner-keys", tmp_path / "no" / "keys", "--names", "a,b")
    assert done.returncode == 10
    assert "cannot make" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_openssl_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotFoundError, match="openssl"):
        make_partner_keys(tmp_path / "keys", ["a", "b"])
