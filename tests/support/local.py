"""A volume of files as the daemon finds it: configuration, media and a formatted record.

Made with the product's own functions, without the command line, for tests of what is below it.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from bitmapd.config import Paths, VolumeConfig, create_volume, load_volume
from bitmapd.media.identity import identify
from bitmapd.record import tool
from bitmapd.record.geometry import KIB, MIB, Geometry
from bitmapd.record.layout import InitialSync, RecordFlag, Superblock, record_size_bytes


class LocalVolume:
    """Files in `folder`, sockets in `run_dir`, which must have a short path.

    Primary and secondary are equal and full of noise; nothing is in the record unless `initial`
    says that everything is.
    """

    def __init__(
        self,
        folder: Path,
        run_dir: Path,
        name: str = "vol0",
        *,
        size_bytes: int = 8 * MIB,
        extent_bytes: int = MIB,
        initial: InitialSync = InitialSync.NONE,
        secondary: str | None = None,
        **settings: Any,
    ) -> None:
        self.name = name
        self.paths = Paths(folder / "etc", run_dir)
        self.primary, self.secondary, self.record = (
            folder / f"{name}.{role}" for role in ("primary", "secondary", "record")
        )
        content = random.Random(name).randbytes(size_bytes)
        self.primary.write_bytes(content)
        self.secondary.write_bytes(content)
        self.geometry = Geometry(size_bytes, extent_bytes, 64 * KIB)
        self.record.write_bytes(bytes(record_size_bytes(self.geometry.extents)))
        target = secondary or str(self.secondary)
        table = {
            "uuid": str(uuid4()),
            "primary": str(self.primary),
            "secondary": target,
            "record": str(self.record),
            "attach": "nbd",
            "era_interval": "100ms",
            **settings,
        }
        create_volume(self.paths, name, table)
        self.config: VolumeConfig = load_volume(self.paths, name)
        now = int(time.time())
        superblock = Superblock(
            volume_uuid=self.config.uuid,
            name=name,
            geometry=self.geometry,
            generations=(uuid4(),),
            primary=identify(self.primary).text,
            primary_size_bytes=size_bytes,
            secondary=identify(target).text,
            secondary_size_bytes=size_bytes,
            created_s=now,
            updated_s=now,
            flags=RecordFlag(0) if initial else RecordFlag.CLEAN,
            initial_sync=initial,
        )
        tool.format_record(self.record, superblock, ones=bool(initial), force=True)

    @property
    def superblock(self) -> Superblock:
        return tool.load(self.record).superblock

    def recorded(self) -> set[int]:
        """Extents in the stored record."""
        bits = tool.load(self.record).bits
        return {extent for extent in range(len(bits)) if bits[extent]}

    def differing(self) -> set[int]:
        """Extents in which the files differ."""
        one, other = self.primary.read_bytes(), self.secondary.read_bytes()
        return {
            extent
            for extent in range(self.geometry.extents)
            if one[extent * MIB : (extent + 1) * MIB] != other[extent * MIB : (extent + 1) * MIB]
        }

    def scribble(self, path: Path, offset_bytes: int, data: bytes = b"scribble") -> None:
        """Change a medium behind everybody's back."""
        with path.open("r+b") as stream:
            stream.seek(offset_bytes)
            stream.write(data)
