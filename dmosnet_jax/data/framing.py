"""TFRecord's framing: `uint64 length, uint32 crc(length), data, uint32 crc(data)`, little-endian, with masked CRC32C.

Source: tensorflow/core/lib/io/record_writer.h.
"""

import struct

import google_crc32c

HEADER = struct.Struct("<QI")
FOOTER = struct.Struct("<I")
OVERHEAD = HEADER.size + FOOTER.size


def frame(data: bytes) -> bytes:
    """A record as it stands in a shard."""
    length = len(data).to_bytes(8, "little")
    return b"".join((length, FOOTER.pack(masked(length)), data, FOOTER.pack(masked(data))))


def masked(data: bytes) -> int:
    """TFRecord's checksum; the mask keeps checksums of data that itself holds checksums apart."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def damage(raw: bytes, length: int) -> str | None:
    """What is wrong with a record of `length` bytes of data, framing included; None where nothing is."""
    if len(raw) != length + OVERHEAD:
        return "the file ends before it does"
    stored, checksum = HEADER.unpack_from(raw)
    if masked(raw[:8]) != checksum:
        return "the checksum of its length differs"
    if stored != length:
        return f"it has {stored} bytes, in its index {length}"
    if masked(raw[HEADER.size : -FOOTER.size]) != FOOTER.unpack_from(raw, len(raw) - FOOTER.size)[0]:
        return "the checksum of its data differs"
    return None
