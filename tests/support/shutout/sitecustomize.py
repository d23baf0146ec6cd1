"""Storage that shuts a node out, as a reservation does: for PYTHONPATH of a bitmapd.

While the file that `SHUT_OUT_BY` names is there, every write to a file called `primary` or
`secondary` ends in EBADE, and nothing of it lands.  A process that executes itself anew keeps this.
"""

import errno
import os

FLAG = os.environ.get("SHUT_OUT_BY")

if FLAG is not None:
    from bitmapd.media import aio

    for name in ("write", "write_now", "write_aside"):
        really = getattr(aio.AioEngine, name)

        def write(self, fd, offset_bytes, buffer, done, fua=False, really=really):  # type: ignore[no-untyped-def]
            medium = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
            if medium in ("primary", "secondary") and os.path.exists(FLAG):
                operation = (aio.PWRITE, fd, buffer, len(buffer), offset_bytes, 0, done)
                self._called(operation, -errno.EBADE)
            else:
                really(self, fd, offset_bytes, buffer, done, fua)

        setattr(aio.AioEngine, name, write)
