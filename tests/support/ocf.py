"""The OCF agent, run as a cluster's executor runs it."""

from __future__ import annotations

import enum
import os
import subprocess
from pathlib import Path

from tests.support.volumes import DMCTL, Volume

AGENT = Path(__file__).parents[2] / "examples/ocf/volume"


class Code(enum.IntEnum):
    """What an agent may return."""

    SUCCESS = 0
    GENERIC = 1
    ARGS = 2
    UNIMPLEMENTED = 3
    INSTALLED = 5
    CONFIGURED = 6
    NOT_RUNNING = 7
    RUNNING_PROMOTED = 8
    FAILED_PROMOTED = 9


def parameters(node: Volume) -> dict[str, str]:
    return {
        "volume": node.name,
        "dmctl": str(DMCTL),
        "config_dir": str(node.folder / "etc"),
        "run_dir": str(node.folder / "run"),
    }


def act(
    node: Volume,
    action: str,
    *,
    timeout_s: int = 60,
    meta: dict[str, str] | None = None,
    **changed: str,
) -> tuple[Code, str]:
    """What it returns, and the reason that it gives the cluster.  `changed`: other parameters;
    `meta`: what the cluster says of the resource."""
    environment = {
        **os.environ,
        "OCF_ROOT": "/usr/lib/ocf",
        "OCF_RESOURCE_INSTANCE": "vol0:0",
        "OCF_RESKEY_CRM_meta_timeout": str(timeout_s * 1000),
        **{f"OCF_RESKEY_{key}": value for key, value in (parameters(node) | changed).items()},
        **{f"OCF_RESKEY_CRM_meta_{key}": value for key, value in (meta or {}).items()},
    }  # fmt: skip
    done = subprocess.run(
        [AGENT, action],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s + 30,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return Code(done.returncode), done.stderr.partition("ocf-exit-reason:")[2].strip()
