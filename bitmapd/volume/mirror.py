"""What brings a volume to its other side: a copier to a plain secondary, a sender to a receiver."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:  # a volume's process need not have the 1 MiB that the other one brings
    from bitmapd.copier.engine import Copier
    from bitmapd.points.sender import Sender

Mirror: TypeAlias = "Copier | Sender"
