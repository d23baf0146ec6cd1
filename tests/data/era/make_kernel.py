"""Make the golden image that a real dm-era wrote, with a metadata snapshot held:

    python -m tests.vm.lab run -- .venv/bin/python -m tests.data.era.make_kernel > OUTPUT
    python -m tests.data.era.make_kernel OUTPUT

The first line runs in the guest and prints the image; the second one puts it beside this file.
The first eras are digested, the newest are in the tree, and one began with the snapshot.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import sys
from pathlib import Path

from dmctl.kernel.barrier import TAKE_SNAPSHOT
from dmctl.model.era import BLOCK_BYTES
from tests.vm.guest.disks import load_modules, size_of
from tests.vm.guest.test_era_metadata import BLOCKS, ERA, era_device

FOLDER = Path(__file__).parent


def make() -> None:
    load_modules()
    with era_device() as made:
        made.write(range(3), range(40_000, 40_100), range(BLOCKS - 1, BLOCKS))
        made.mapper.message(ERA, "checkpoint")
        made.write(range(1, 2), range(32_576, 32_577))
        made.until_digested()
        made.write(range(7, 8), range(64, 128))
        made.mapper.message(ERA, "checkpoint")
        made.write(range(20_000, 20_010), range(1))
        made.mapper.message(ERA, TAKE_SNAPSHOT)
        made.write(range(500, 600))
        whole = b"".join(
            bytes(made.reader.read_block(number))
            for number in range(size_of(made.metadata_path) // BLOCK_BYTES)
        )
        root = made.status().held_root
    print("IMAGE", base64.b64encode(gzip.compress(whole, mtime=0)).decode())
    eras = {str(era): sorted(numbers) for era, numbers in made.written.items()}
    print("WRITTEN", json.dumps({"root": root, "eras": eras}, separators=(",", ":")))


def keep(output: str) -> None:
    image, written = (re.search(rf"^{tag} (.*)$", output, re.M) for tag in ("IMAGE", "WRITTEN"))
    if image is None or written is None:
        raise SystemExit("that is not what the guest printed")
    (FOLDER / "kernel.img.gz").write_bytes(base64.b64decode(image[1]))
    (FOLDER / "kernel.json").write_text(written[1] + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        keep(Path(sys.argv[1]).read_text())
    else:
        make()
