"""Make the golden images of era metadata: `python -m tests.data.era.make_golden`.

`era_restore` of thin-provisioning-tools writes them from a description, so they are the format as
others understand it.  Beside NAME.img.gz stands NAME.json with what was described; `digested`
is there a list of [era, number of blocks in a row].
"""

from __future__ import annotations

import gzip
import json
import random
import subprocess
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

FOLDER = Path(__file__).parent
BLOCK_SECTORS = 128


def xml(
    blocks: int, writesets: Mapping[int, Collection[int]], digested: Sequence[int], current: int
) -> str:
    """The description that `era_restore` reads."""
    top = ElementTree.Element(
        "superblock",
        uuid="",
        block_size=str(BLOCK_SECTORS),
        nr_blocks=str(blocks),
        current_era=str(current),
    )
    for era, marked in sorted(writesets.items()):
        writeset = ElementTree.SubElement(top, "writeset", era=str(era), nr_bits=str(blocks))
        for block in sorted(marked):
            ElementTree.SubElement(writeset, "bit", block=str(block), value="true")
    array = ElementTree.SubElement(top, "era_array")
    for block, era in enumerate(digested):
        ElementTree.SubElement(array, "era", block=str(block), era=str(era))
    return ElementTree.tostring(top, encoding="unicode")


def restore(description: str, image: Path, size_blocks: int = 1024) -> None:
    """Have `era_restore` make `image`; `CalledProcessError` if it will not."""
    source = image.with_suffix(".xml")
    source.write_text(description)
    with image.open("wb") as file:
        file.truncate(size_blocks * 4096)
    subprocess.run(
        ["era_restore", "-i", str(source), "-o", str(image)], check=True, capture_output=True
    )


def cases() -> dict[str, dict[str, Any]]:
    rng = random.Random(3)
    return {
        "fresh": {"blocks": 10, "writesets": {}, "digested": [0] * 10, "current": 1},
        "undigested": {
            "blocks": 70_001,  # more than two array blocks of a bitset, and an odd end
            "writesets": {
                1: [0, 63, 64, 32_575, 32_576, 70_000],
                2: [],
                3: sorted(rng.sample(range(70_001), 300)),
            },
            "digested": [0] * 70_001,
            "current": 4,
        },
        "digesting": {
            "blocks": 3001,
            "writesets": {7: list(range(1000, 1200)), 8: [2999, 3000]},
            "digested": [rng.choice((0, 0, 3, 6)) for _ in range(1000)] + [7] * 100 + [0] * 1901,
            "current": 9,
        },
        "digested": {
            "blocks": 1019,
            "writesets": {},
            "digested": [5] + [rng.randrange(12) for _ in range(1017)] + [11],
            "current": 12,
        },
        "many-eras": {
            "blocks": 65,
            "writesets": {era: [era % 65] for era in range(2, 450)},
            "digested": [1] * 65,
            "current": 450,
        },
    }


def main() -> None:
    for name, case in cases().items():
        image = FOLDER / f"{name}.img"
        restore(xml(**case), image)
        image.with_suffix(".xml").unlink()
        (FOLDER / f"{name}.img.gz").write_bytes(gzip.compress(image.read_bytes(), mtime=0))
        image.unlink()
        case["digested"] = [[era, len(list(same))] for era, same in groupby(case["digested"])]
        (FOLDER / f"{name}.json").write_text(json.dumps(case, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
