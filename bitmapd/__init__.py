"""bitmapd: the mirroring appliance (record, predictor, gate, copier, NBD export)."""

import sys

__version__ = "0.1.0"


def is_compiled() -> bool:
    """Whether the modules that requests of hosts pass through, as far as this process has imported
    any, are those that `make wheel-compiled` has compiled."""
    return "bitmapd__mypyc" in sys.modules


def version_text() -> str:
    """The version, and how the code came to run, for people."""
    return f"{__version__} (compiled)" if is_compiled() else __version__
