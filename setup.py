"""Builds the wheel; with DMCTL_COMPILED=1 one in which the modules of `HOT` are compiled.

Everything else about the package is in pyproject.toml.  `make wheel-compiled` calls this with the
mypy of the development environment, whose mypyc is the compiler; nothing else needs either.  The
sources are in both wheels and are the reference: docs/decisions/0008-compiled-modules.md.
"""

import os

from setuptools import setup

# What a request of a host passes through, and what a miss adds, in one group: a call from one
# compiled module to another of the same group costs what a call in C costs.
HOT = [
    *(f"bitmapd/media/{name}.py" for name in ("aio", "base", "buffers", "kdevice", "lost")),
    "bitmapd/media/workers.py",
    "bitmapd/gate/withheld.py",
    *(f"bitmapd/gate/{name}.py" for name in ("blockset", "changes", "clearing", "cycle")),
    *(f"bitmapd/gate/{name}.py" for name in ("elsewhere", "eras", "flights", "gate", "inturns")),
    "bitmapd/gate/unsettled.py",
    *(f"bitmapd/nbd/server/{name}.py" for name in ("connection", "export", "hub", "memory")),
    *(f"bitmapd/nbd/server/{name}.py" for name in ("outbox", "patience", "requests", "service")),
    *(f"bitmapd/nbd/server/{name}.py" for name in ("spin", "stream")),
    *(f"bitmapd/predict/{name}.py" for name in ("lru", "nearby", "odds", "policy", "stays")),
    *(f"bitmapd/predict/{name}.py" for name in ("superset", "trail")),
    *(f"bitmapd/record/{name}.py" for name in ("extents", "geometry", "holder", "page_writer")),
    "bitmapd/record/store.py",
]

if __name__ == "__main__":
    if os.environ.get("DMCTL_COMPILED") == "1":
        from mypyc.build import mypycify

        # A branch that mypy takes for dead is compiled to an error, so there must be none.
        strict = ["--strict", "--warn-unreachable"]
        setup(ext_modules=mypycify([*strict, *HOT], multi_file=True, group_name="bitmapd"))
    else:
        setup()
