"""CRC-32C out of the extension alone is that of the package."""

from __future__ import annotations

import crc32c as package
import pytest

from bitmapd import crc


@pytest.mark.parametrize("data", [b"", b"123456789", bytes(4096)])
def test_it_is_the_packages(data: bytes) -> None:
    assert crc.crc32c(data) == package.crc32c(data)
    assert crc.crc32c(data, 7) == package.crc32c(data, 7)
    assert crc.crc32c(b"123456789") == 0xE3069283  # RFC 3720, B.4 has more of them


def test_a_package_that_is_made_otherwise_is_taken_as_it_is() -> None:
    assert crc._load("crc32c", "not_there") is package.crc32c
