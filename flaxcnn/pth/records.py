"""Where the records of a zip or tar file are in it: only what torch.save writes, strictly.

The files are not trusted. Records that overlap, have the same name, are compressed, encrypted,
links or sparse are refused. Names are compared, never used as paths.
"""

import re
import struct
from dataclasses import dataclass
from itertools import pairwise

from flaxcnn.errors import WeightsError
from flaxcnn.pth.unpickle import quoted

try:
    from zlib_ng.zlib_ng import crc32  # four times as fast as zlib's
except ImportError:  # pip installs it, but flaxcnn works without
    from zlib import crc32

_END = struct.Struct("<4s4H2LH")  # end of central directory
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")  # of the central directory
_LOCAL = struct.Struct("<4s5H3L2H")  # in front of each record
_MOST_RECORDS = 2**17  # 80 times those of the largest network here
_LONGEST_COMMENT = 2**16 - 1
_FULL = {2**16 - 1, 2**32 - 1}  # "see the 64-bit field"
_ENCRYPTED = 1


@dataclass(frozen=True, slots=True)
class Record:
    """data[start : start + size]; `crc` is None in files that were written without checksums."""

    name: str
    start: int
    size: int
    crc: int | None = None
    stored: bool = True  # rather than compressed or encrypted

    def check(self, data: memoryview) -> None:
        """Raises WeightsError if the bytes are not those that torch wrote."""
        if not self.stored:
            raise WeightsError(
                f"refused: record {quoted(self.name)} is compressed or encrypted; torch stores it"
            )
        if self.crc is None:
            return
        if crc32(data[self.start : self.start + self.size]) != self.crc:
            raise WeightsError(f"damaged: the checksum of {quoted(self.name)} is wrong")


# --------------------------------------------------------------------------------------------- zip
@dataclass(frozen=True, slots=True)
class _Entry:
    offset: int  # of the local header
    name: bytes
    size: int
    crc: int
    stored: bool


def zip_records(data: memoryview) -> dict[str, Record]:
    """The records of a zip file by name.

    Where all checksums are 0 there are none: torch writes such files when told not to compute them.

    Raises:
        WeightsError: if it is cut short, damaged, or not as torch writes it.
    """
    directory, count, end = _central_directory(data)
    if count > _MOST_RECORDS:
        raise WeightsError(f"refused: {count} records in a zip file")
    entries: list[_Entry] = []
    position = directory
    while position < end and len(entries) <= count:
        entry, position = _entry(data, position, end)
        entries.append(entry)
    if len(entries) != count:
        raise WeightsError(f"damaged: the zip directory has not the {count} records it promises")

    starts = [_record_start(data, entry, directory) for entry in entries]
    extents = sorted(
        (entry.offset, start + entry.size) for entry, start in zip(entries, starts, strict=True)
    )
    for (_, previous_end), (offset, _) in pairwise([*extents, (directory, end)]):
        if previous_end > offset:
            raise WeightsError("refused: records of the zip file overlap")

    checked = any(entry.crc for entry in entries)
    records: dict[str, Record] = {}
    for entry, start in zip(entries, starts, strict=True):
        name = entry.name.decode("utf-8", "surrogateescape")
        if name in records:
            raise WeightsError(f"refused: two records are called {quoted(name)}")
        crc = entry.crc if checked else None
        records[name] = Record(name, start, entry.size, crc, entry.stored)
    return records


def _central_directory(data: memoryview) -> tuple[int, int, int]:
    """Its start, its number of entries, its end."""
    tail_start = max(0, len(data) - _END.size - _LONGEST_COMMENT)
    tail = bytes(data[tail_start:])
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + _END.size > len(tail):
        raise WeightsError("cut short: the zip directory at its end is missing")
    _, *disks, count, size, start, comment = _END.unpack_from(tail, at)
    if at + _END.size + comment != len(tail):
        raise WeightsError("cut short or damaged: the end of the zip directory is not at the end")
    end = tail_start + at
    here = [*disks, count, size, start]

    if end >= _LOCATOR64.size and _at(data, end - _LOCATOR64.size) == b"PK\6\7":
        _, _, end64, _ = _LOCATOR64.unpack_from(data, end - _LOCATOR64.size)
        if end64 + _END64.size != end - _LOCATOR64.size or _at(data, end64) != b"PK\6\6":
            raise WeightsError("damaged: the 64-bit end of the zip directory is not in its place")
        _, _, _, _, *wide = _END64.unpack_from(data, end64)
        if any(a not in (b, *_FULL) for a, b in zip(here, wide, strict=True)):
            raise WeightsError("damaged: the zip directory has two ends that disagree")
        here, end = wide, end64
    disk, first_disk, count_here, count, size, start = here
    if disk or first_disk or count_here != count:
        raise WeightsError("refused: a zip file in several parts")
    if start + size != end:
        raise WeightsError("damaged: the zip directory is not in its place")
    return start, count, end


def _entry(data: memoryview, at: int, end: int) -> tuple[_Entry, int]:
    """An entry of the directory, and where the next one starts."""
    if at + _ENTRY.size > end or _at(data, at) != b"PK\1\2":
        raise WeightsError("damaged: the zip directory has a broken entry")
    fields = _ENTRY.unpack_from(data, at)
    _, _, _, flags, method, _, _, crc, packed, size, name_len, extra_len, comment_len = fields[:13]
    offset = fields[16]
    extra_at = at + _ENTRY.size + name_len
    after = extra_at + extra_len + comment_len
    if after > end:
        raise WeightsError("damaged: the zip directory has a broken entry")
    name = bytes(data[at + _ENTRY.size : extra_at])
    size, packed, offset = _wide((size, packed, offset), data[extra_at : extra_at + extra_len])
    stored = not method and not flags & _ENCRYPTED
    if stored and size != packed:
        raise WeightsError(f"damaged: record {quoted(name.decode('latin1'))} has two sizes")
    return _Entry(offset, name, packed, crc, stored), after


def _wide(values: tuple[int, int, int], extra: memoryview) -> list[int]:
    """The values, those too large for 32 bits read from the extra field that zip64 has for them."""
    if 2**32 - 1 not in values:
        return list(values)
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        field, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind == 1 and len(field) >= 8 * values.count(2**32 - 1):
            wide = iter(struct.unpack_from(f"<{len(field) // 8}Q", field))
            return [next(wide) if value == 2**32 - 1 else value for value in values]
    raise WeightsError("damaged: a zip record lacks its 64-bit sizes")


def _record_start(data: memoryview, entry: _Entry, directory: int) -> int:
    """Where the bytes of a record start, behind its local header."""
    at = entry.offset
    if at + _LOCAL.size > directory or _at(data, at) != b"PK\3\4":
        raise WeightsError("damaged: a zip record is not where the directory says")
    _, _, _, _, _, _, _, _, _, name_len, extra_len = _LOCAL.unpack_from(data, at)
    name_at = at + _LOCAL.size
    if bytes(data[name_at : name_at + name_len]) != entry.name:
        raise WeightsError("damaged: a zip record is not the one that the directory says")
    return name_at + name_len + extra_len


def _at(data: memoryview, position: int) -> bytes:
    """The signature there."""
    return bytes(data[position : position + 4])


# --------------------------------------------------------------------------------------------- tar
_BLOCK = 512


def tar_records(data: memoryview) -> dict[str, Record]:
    """The files in a tar file by name; headers of the pax format are skipped.

    Raises:
        WeightsError: if it is cut short, damaged, or has anything but files.
    """
    records: dict[str, Record] = {}
    position = 0
    while any(header := bytes(data[position : position + _BLOCK])):
        if len(header) < _BLOCK:
            raise WeightsError("cut short: the tar file ends in a header")
        name, size, kind = _tar_header(header)
        start = position + _BLOCK
        if start + size > len(data):
            raise WeightsError(f"cut short: {quoted(name)} goes on behind the end")
        position = start + -(-size // _BLOCK) * _BLOCK
        if kind in (b"x", b"g"):  # times to the fraction of a second, and the like
            continue
        if kind not in (b"0", b"\0"):
            raise WeightsError(f"refused: {quoted(name)} in the tar file is a link or no file")
        if name in records:
            raise WeightsError(f"refused: two records are called {quoted(name)}")
        records[name] = Record(name, start, size)
    return records


def _tar_header(header: bytes) -> tuple[str, int, bytes]:
    """Name, size and kind of a member."""
    blanked = header[:148] + b" " * 8 + header[156:]
    if _octal(header[148:156]) != sum(blanked):
        raise WeightsError("damaged: the checksum of a tar header is wrong")
    name = header[:100].rstrip(b"\0").decode("latin1")
    return name, _octal(header[124:136]), header[156:157]


def _octal(field: bytes) -> int:
    if not re.fullmatch(rb" *[0-7]+[ \0]*", field):
        raise WeightsError("damaged: a number in a tar header is not octal")
    return int(field.strip(b" \0"), 8)
