"""Commands that stand in the contract and are not in this build."""

from __future__ import annotations

from argparse import Namespace

from bitmapd.errors import WrongStateError
from dmctl.cli.context import Context


def refuse(_context: Context, args: Namespace) -> int:
    raise WrongStateError(
        f"'dmctl {args.command}' comes with {args.feature}, which this build does not have",
        hint="nothing was changed",
    )
