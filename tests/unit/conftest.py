"""Fixtures of several modules: volumes to order, places for a record, golden images."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bitmapd.record.layout import record_size_bytes
from tests.data import make_golden
from tests.support.local import LocalVolume
from tests.support.loops import loop_device, sparse_file


@pytest.fixture
def make_local(tmp_path: Path, short_path: Path) -> Callable[..., LocalVolume]:
    return lambda **options: LocalVolume(tmp_path, short_path, **options)


@pytest.fixture(params=["file", "loop-512", "loop-4096"])
def medium(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty place for a record that is somewhat larger than needed."""
    path = sparse_file(tmp_path / "medium", record_size_bytes(make_golden.EXTENTS) + 8192)
    if request.param == "file":
        yield str(path)
        return
    with loop_device(path, int(request.param.partition("-")[2])) as name:
        yield name


@pytest.fixture
def golden(tmp_path: Path) -> Callable[[str], str]:
    def unpack(name: str) -> str:
        packed = (make_golden.FOLDER / f"{name}.img.gz").read_bytes()
        path = tmp_path / name
        path.write_bytes(gzip.decompress(packed))
        return str(path)

    return unpack
