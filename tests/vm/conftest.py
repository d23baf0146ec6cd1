"""Tests of the lab run on the host, except those in `guest`, which run inside (`LAB_GUEST`)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.vm.kernel import VmUnavailable, ready
from tests.vm.qemu import check_machine

HERE = Path(__file__).parent
IN_GUEST = os.environ.get("LAB_GUEST") == "1"
TEST_S = 900
PROGRESS = os.environ.get("LAB_PROGRESS")

collect_ignore = [] if IN_GUEST else ["guest"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if IN_GUEST:
        if PROGRESS is not None:
            begun = set(Path(PROGRESS).read_text(encoding="utf-8").splitlines())
            config.hook.pytest_deselected(items=[item for item in items if item.nodeid in begun])
            items[:] = [item for item in items if item.nodeid not in begun]
        return
    # Boots of an emulated machine take longer than the usual limit of a test.
    for item in items:
        if item.path.is_relative_to(HERE) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_S))


def pytest_runtest_logstart(nodeid: str) -> None:
    """Lets the host know which test killed the guest, and which are left (`tests/vm/suite.py`)."""
    if PROGRESS is not None:
        with open(PROGRESS, "a", encoding="utf-8") as stream:
            stream.write(f"{nodeid}\n")


@pytest.fixture(scope="session")
def vm() -> None:
    """Skips what needs a guest where none can run; fails it if LAB_REQUIRED is set."""
    try:
        check_machine()
        ready()
    except VmUnavailable as reason:
        if os.environ.get("LAB_REQUIRED"):
            pytest.fail(f"no virtual machine: {reason}")
        pytest.skip(f"NO VIRTUAL MACHINE: {reason}")
