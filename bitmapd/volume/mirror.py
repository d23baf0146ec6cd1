"""What brings a volume to its other side: a copier to a plain secondary, a sender to a receiver."""

from __future__ import annotations

from bitmapd.copier.engine import Copier
from bitmapd.points.sender import Sender

Mirror = Copier | Sender
