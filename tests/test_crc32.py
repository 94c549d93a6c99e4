"""The CRC-32 of parts put together is that of the whole."""

import random
import zlib

import pytest

from flaxcnn import crc32


@pytest.mark.parametrize("part", [1, 7, 64, 1000])
def test_as_zlib_has_it(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crc32, "_PART_BYTES", part)
    rng = random.Random(part)
    for length in [*range(20), 63, 64, 65, 999, 1000, 1001, 3000]:
        data = rng.randbytes(length)
        assert crc32.crc32(memoryview(data)) == zlib.crc32(data), length
    zeros = bytes(3001)
    assert crc32.crc32(memoryview(zeros)) == zlib.crc32(zeros)


def test_of_as_many_parts_as_large_files_have() -> None:
    data = memoryview(random.Random(0).randbytes(5 * 2**24 + 12345))
    assert crc32.crc32(data) == zlib.crc32(data)
    damaged = bytearray(data)
    damaged[3 * 2**24] ^= 1
    assert crc32.crc32(memoryview(damaged)) != zlib.crc32(data)
