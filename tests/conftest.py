"""Settings every test shares.

Hypothesis keeps no example database (tests run in parallel in a clean tree) and sets no deadline
(a loaded machine is no failure).  `FUZZ_EXAMPLES` makes the fuzz tests longer; `EXAMPLES_PART=N`
tries an N-th of the examples of every other test, as `make test-fast` does.  `short_path` is a
`tmp_path` in which the path of a unix socket stays below the system's limit of 107 bytes; `local`
has the files of a volume.

A shell without job control starts what is in the background with SIGINT ignored, and that is
inherited by every program down to those that a test interrupts; here it gets its meaning back.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.local import LocalVolume
from tests.support.machines import examples

settings.register_profile(
    "tests",
    deadline=None,
    database=None,
    max_examples=examples(100),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "fuzz",
    parent=settings.get_profile("tests"),
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "100")),
)
settings.load_profile("fuzz" if "FUZZ_EXAMPLES" in os.environ else "tests")


def pytest_configure() -> None:
    """Of a worker, too: each reads this file."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def short_path() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="dm"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def local(tmp_path: Path, short_path: Path) -> LocalVolume:
    return LocalVolume(tmp_path, short_path)
