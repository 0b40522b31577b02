"""Compress wheels in place with Zopfli, which makes them about 3 % smaller than zlib does.

Usage: python scripts/compress_wheel.py WHEEL...

The files in a wheel, their order, their times and their modes stay the same. Needs the package zopfli.
"""

import io
import struct
import sys
import zipfile
from pathlib import Path

import zopfli.zlib

LOCAL, CENTRAL, END = struct.Struct("<4s5H3L2H"), struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s4H2LH")
VERSION = 20  # of the ZIP format; the first with the method deflate
UTF8 = 0x800  # the flag of names in UTF-8


def compressed(wheel: bytes) -> bytes:
    """The same archive, with each file compressed by Zopfli. Files that would grow are stored."""
    body, directory = bytearray(), bytearray()
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        for info in archive.infolist():
            data, name = archive.read(info), info.filename.encode()
            method, packed = zipfile.ZIP_DEFLATED, zopfli.zlib.compress(data, numiterations=5)[2:-4]
            if len(packed) >= len(data):
                method, packed = zipfile.ZIP_STORED, data
            year, month, day, hour, minute, second = info.date_time
            date, time = (year - 1980) << 9 | month << 5 | day, hour << 11 | minute << 5 | second // 2
            about = (UTF8, method, time, date, info.CRC, len(packed), len(data), len(name))
            made_by = info.create_system << 8 | VERSION
            directory += CENTRAL.pack(
                b"PK\1\2", made_by, VERSION, *about, 0, 0, 0, 0, info.external_attr, len(body)
            )
            directory += name
            body += LOCAL.pack(b"PK\3\4", VERSION, *about, 0) + name + packed
        count = len(archive.infolist())
    end = END.pack(b"PK\5\6", 0, 0, count, count, len(directory), len(body), 0)
    return bytes(body + directory + end)


def contents(wheel: bytes) -> list[tuple[str, tuple[int, ...], int, bytes]]:
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        return [(i.filename, i.date_time, i.external_attr, archive.read(i)) for i in archive.infolist()]


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        before = path.read_bytes()
        after = compressed(before)
        if contents(after) != contents(before):
            raise SystemExit(f"{path}: the files in the wheel have changed")
        path.write_bytes(after)
        print(f"{path.name}: {len(before):,} -> {len(after):,} bytes")


if __name__ == "__main__":
    main()
