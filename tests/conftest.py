"""Settings every test shares.

Hypothesis keeps no example database (tests run in parallel in a clean tree) and sets no deadline
(a loaded machine is no failure).  `FUZZ_EXAMPLES` makes the fuzz tests longer.  `short_path` is a
`tmp_path` in which the path of a unix socket stays below the system's limit of 107 bytes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "tests", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "fuzz",
    parent=settings.get_profile("tests"),
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "100")),
)
settings.load_profile("fuzz" if "FUZZ_EXAMPLES" in os.environ else "tests")


@pytest.fixture
def short_path() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="dm"))
    yield path
    shutil.rmtree(path)
