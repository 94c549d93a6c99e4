"""The CRC-32 of large data by all cores: of parts, and put together.

A CRC is the remainder of the data, as a polynomial over GF(2), divided by zlib's; so the CRC of two
parts is that of the first times x^(bits of the second), plus that of the second. A polynomial is an
int here whose highest of 32 bits is the coefficient of x^0, as zlib's remainders are.
"""

import zlib

from flaxcnn.threads import in_threads

_PART_BYTES = 2**24
_DIVISOR = 0xEDB88320
_ONE = 1 << 31


def crc32(data: memoryview) -> int:
    """As `zlib.crc32`, of bytes."""
    starts = range(0, len(data), _PART_BYTES)
    if len(starts) < 2:
        return zlib.crc32(data)
    parts = [data[start : start + _PART_BYTES] for start in starts]
    whole, shift = 0, _power_of_x(8 * _PART_BYTES)
    *remainders, last = in_threads(zlib.crc32, parts, len(data))
    for remainder in remainders:
        whole = _product(whole, shift) ^ remainder
    return _product(whole, _power_of_x(8 * len(parts[-1]))) ^ last


def _product(a: int, b: int) -> int:
    """Modulo the divisor."""
    result = 0
    while a:
        if a & _ONE:
            result ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (_DIVISOR if b & 1 else 0)  # times x
    return result


def _power_of_x(exponent: int) -> int:
    """x^exponent modulo the divisor, by squares."""
    result, square = _ONE, _ONE >> 1
    while exponent:
        if exponent & 1:
            result = _product(result, square)
        square = _product(square, square)
        exponent >>= 1
    return result
