"""What an image file says of itself, read before any decoder touches it. No pixels here.

Decoders are generous: libjpeg fills what is missing of a truncated file with grey, libtiff multiplies colours
by their alpha, a GIF's palette is approximated, an animation becomes its first picture. Each of these would
be a wrong score instead of an error. So `inspect_header` lets through only files that are complete, within
the limits, and of a kind that is known to decode exactly, and reads the orientation for `decode` to apply.

Sources: PNG (ISO/IEC 15948) 5 and 11; JPEG (ITU-T T.81) annex B; TIFF 6.0; Exif 2.32, 4.6.4; RFC 9649 (WebP).
A JPEG carries no checksum: a flipped bit inside its coded data cannot be told from a picture.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from edgead.runtime.spec import Limits

LONGEST_SIDE = 65536
"""Pixels; also the reach of `Region`."""

_PNG = b"\x89PNG\r\n\x1a\n"
_FOREIGN = {
    b"GIF8": "a GIF",
    b"\0\0\0\x0cjP  ": "a JPEG 2000 file",
    b"\xff\x4f\xff\x51": "a JPEG 2000 file",
    b"\x76\x2f\x31\x01": "an OpenEXR file",
    b"%PDF": "a PDF",
    b"<svg": "an SVG",
    b"<?xm": "an XML file",
    b"<!DO": "a web page",
    b"<htm": "a web page",
    b"II+\0": "a BigTIFF file",
    b"MM\0+": "a BigTIFF file",
    b"8BPS": "a Photoshop file",
}
# In coded data 0xFF is followed by 0 (stuffing) or by a restart marker; anything else ends the scan.
_SCAN_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BARE_MARKERS = frozenset({0x01, *range(0xD0, 0xD8)})
_TIFF_TYPES = {1: "B", 3: "H", 4: "I"}
_TIFF_COMPRESSIONS = frozenset({1, 5, 7, 8, 32773, 32946})
_TIFF_TAGS = frozenset({256, 257, 258, 259, 262, 273, 274, 277, 279, 284, 324, 325, 338, 339})
_MAX_PARTS = 2**18
"""Chunks, segments, strips or tiles of one file; bounds the time that a hostile one can take."""
_MAX_SCANS = 100
"""Of a progressive JPEG: each costs the decoder a pass over the whole picture; encoders make about ten."""


class Unfit(Exception):
    """Why a file is not decoded, as what was found: 'a truncated file'."""


@dataclass(frozen=True)
class Header:
    """What a decoder is going to find.

    Attributes:
        kind: the format's name.
        width, height: pixels as stored, before `orientation`.
        orientation: Exif orientation, 1..8; 1 is upright.
    """

    kind: str
    width: int
    height: int
    orientation: int = 1


def inspect_header(data: bytes, limits: Limits) -> Header:
    """Read a file's header and check that the file is whole.

    Raises:
        Unfit: empty, truncated, over the limits, of an unknown format, or of a kind that does not decode
            exactly (animations, several pages, CMYK, floating point, associated alpha).
    """
    if not data:
        raise Unfit("an empty file")
    try:
        header = _read(data)
    except (struct.error, IndexError) as error:
        raise Unfit("a truncated file") from error
    _check_size(header.width, header.height, limits)
    return header


def _read(data: bytes) -> Header:
    if data.startswith(_PNG):
        return _png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data.startswith(b"BM"):
        return _bmp(data)
    if data[:4] in (b"II*\0", b"MM\0*"):
        return _tiff(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp(data)
    raise Unfit(f"{_foreign(data)}, which is none of PNG, JPEG, BMP, TIFF, WebP")


def _foreign(data: bytes) -> str:
    if data[4:8] == b"ftyp":
        return "an AVIF, HEIF or video file"
    for magic, kind in _FOREIGN.items():
        if data.lower().startswith(magic.lower()):
            return kind
    return "unknown content"


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise Unfit(f"a header that says {width} x {height} pixels")
    if width * height > limits.image_pixels or max(width, height) > LONGEST_SIDE:
        raise Unfit(
            f"{width} x {height} pixels, more than the limit of {limits.image_pixels} in all"
            f" or {LONGEST_SIDE} on a side"
        )


def _png(data: bytes) -> Header:
    if data[12:16] != b"IHDR":
        raise Unfit("a damaged PNG")
    width, height = struct.unpack_from(">II", data, 16)
    orientation, position, coded = 1, 8, False
    for _ in range(_MAX_PARTS):
        (length,) = struct.unpack_from(">I", data, position)
        kind = data[position + 4 : position + 8]
        end = position + 12 + length
        if end > len(data):
            raise Unfit("a truncated file")
        if zlib.crc32(memoryview(data)[position + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            raise Unfit("a damaged PNG (a checksum is wrong)")
        if kind == b"acTL":
            raise Unfit("an animation")
        if kind == b"eXIf":
            orientation = _exif_orientation(data[position + 8 : end - 4])
        coded = coded or kind == b"IDAT"
        if kind == b"IEND" and coded:
            return Header("PNG", width, height, orientation)
        position = end
    raise Unfit("a PNG without a picture")


def _jpeg(data: bytes) -> Header:
    size: tuple[int, int] | None = None
    orientation, position, scans = 1, 2, 0
    for _ in range(_MAX_PARTS):
        if data[position] != 0xFF:
            raise Unfit("a damaged JPEG")
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if marker == 0xD9:
            break
        if marker in _BARE_MARKERS:
            position += 2
            continue
        (length,) = struct.unpack_from(">H", data, position + 2)
        end = position + 2 + length
        if length < 2 or end > len(data):
            raise Unfit("a truncated file")
        if marker in _FRAME_MARKERS:
            if size is not None:
                raise Unfit("a JPEG of several frames")
            size = _jpeg_frame(data, position, marker)
        elif marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            orientation = _exif_orientation(data[position + 10 : end])
        position = end
        if marker == 0xDA:
            scans += 1
            found = _SCAN_END.search(data, position)
            if found is None:
                raise Unfit("a truncated file")
            position = found.start()
    if size is None or not 0 < scans <= _MAX_SCANS:
        raise Unfit("a JPEG without a picture")
    return Header("JPEG", *size, orientation)


def _jpeg_frame(data: bytes, position: int, marker: int) -> tuple[int, int]:
    precision, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
    if marker not in (0xC0, 0xC1, 0xC2) or precision != 8:
        raise Unfit("a JPEG that is neither baseline nor progressive with 8 bits")
    if components not in (1, 3):
        raise Unfit("a JPEG in CMYK, whose colours depend on a printer's profile")
    return width, height


def _bmp(data: bytes) -> Header:
    offset, size = struct.unpack_from("<II", data, 10)
    if size < 40:
        raise Unfit("a BMP of OS/2")
    width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    standard = compression == 3 and bits == 32 and data[54:66] == struct.pack("<III", 0xFF0000, 0xFF00, 0xFF)
    if bits not in (1, 4, 8, 24, 32) or not (compression == 0 or standard):
        raise Unfit(f"a BMP of {bits} bits with compression {compression}")
    if offset + (abs(width) * bits + 31) // 32 * 4 * abs(height) > len(data):
        raise Unfit("a truncated file")
    return Header("BMP", width, abs(height))


def _tiff(data: bytes) -> Header:
    order = "<" if data[:2] == b"II" else ">"
    tags, following = _directory(data, order)
    if following:
        raise Unfit("a TIFF of several pages")

    def first(tag: int, default: int = 0) -> int:
        return (tags.get(tag) or [default])[0]

    bits, photometric, compression = tags.get(258, [1]), first(262, -1), first(259, 1)
    samples, depth = first(277, 1), first(258, 1)
    if any(value not in (1, 4) for value in tags.get(339, [])):
        raise Unfit("a TIFF of signed or floating point samples")
    if photometric == 5:
        raise Unfit("a TIFF in CMYK, whose colours depend on a printer's profile")
    if 338 in tags:
        raise Unfit("a TIFF with an alpha channel, which is ambiguous there")
    plain = (
        (photometric in (0, 1) and samples == 1 and depth in ((1, 8) if photometric == 0 else (1, 8, 16)))
        or (photometric == 2 and samples == 3 and depth in (8, 16))
        or (photometric == 3 and samples == 1 and depth == 8)
        or (photometric == 6 and samples == 3 and depth == 8 and compression == 7)
    )
    if not plain or set(bits) != {depth} or first(284, 1) != 1 or compression not in _TIFF_COMPRESSIONS:
        raise Unfit(
            f"a TIFF of {samples} samples of {depth} bits, photometric interpretation {photometric},"
            f" compression {compression}"
        )
    if first(274, 1) != 1:
        raise Unfit(f"a TIFF that asks to be turned (orientation {first(274)})")
    for offsets, counts in ((273, 279), (324, 325)):
        for start, count in zip(tags.get(offsets, []), tags.get(counts, []), strict=False):
            if start + count > len(data):
                raise Unfit("a truncated file")
    if not (tags.get(279) or tags.get(325)):
        raise Unfit("a TIFF without a picture")
    return Header("TIFF", first(256), first(257))


def _webp(data: bytes) -> Header:
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise Unfit("a truncated file")
    size: tuple[int, int] | None = None
    orientation, coded = 1, False
    for kind, start, length in _riff_chunks(data, end):
        if kind == b"VP8X":
            if data[start] & 2:
                raise Unfit("an animation")
            size = (
                1 + int.from_bytes(data[start + 4 : start + 7], "little"),
                1 + int.from_bytes(data[start + 7 : start + 10], "little"),
            )
        elif kind == b"VP8L":
            bits = int.from_bytes(data[start + 1 : start + 5], "little")
            size, coded = size or (1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)), True
        elif kind == b"VP8 ":
            width, height = struct.unpack_from("<HH", data, start + 6)
            size, coded = size or (width & 0x3FFF, height & 0x3FFF), True
        elif kind == b"EXIF":
            exif = data[start : start + length]
            orientation = _exif_orientation(exif.removeprefix(b"Exif\0\0"))
    if size is None or not coded:
        raise Unfit("a WebP file without a picture")
    return Header("WebP", *size, orientation)


def _riff_chunks(data: bytes, end: int) -> Iterator[tuple[bytes, int, int]]:
    position = 12
    for _ in range(_MAX_PARTS):
        if position + 8 > end:
            return
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        if position + 8 + length > end:
            raise Unfit("a truncated file")
        yield data[position : position + 4], position + 8, length
        position += 8 + length + length % 2


def _exif_orientation(exif: bytes) -> int:
    """The orientation in a block of Exif; 1 where there is none, or none that can be read."""
    if exif[:4] not in (b"II*\0", b"MM\0*"):
        return 1
    try:
        tags, _ = _directory(exif, "<" if exif[:2] == b"II" else ">")
    except (struct.error, Unfit):
        return 1
    value = (tags.get(274) or [1])[0]
    return value if 1 <= value <= 8 else 1


def _directory(data: bytes, order: str) -> tuple[dict[int, list[int]], int]:
    """Whole-number tags of the first TIFF directory, and where the next one starts (0: nowhere)."""
    (offset,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, offset)
    tags: dict[int, list[int]] = {}
    for entry in range(count):
        start = offset + 2 + 12 * entry
        tag, kind, values = struct.unpack_from(order + "HHI", data, start)
        code = _TIFF_TYPES.get(kind)
        if code is None or tag not in _TIFF_TAGS:
            continue
        if tag in tags or values > _MAX_PARTS:
            raise Unfit("a damaged TIFF")
        size = values * struct.calcsize(code)
        where = start + 8 if size <= 4 else struct.unpack_from(order + "I", data, start + 8)[0]
        if where + size > len(data):
            raise Unfit("a truncated file")
        tags[tag] = list(struct.unpack_from(f"{order}{values}{code}", data, where))
    end = offset + 2 + 12 * count
    # Exif blocks in the wild leave the last field out.
    following = struct.unpack_from(order + "I", data, end)[0] if end + 4 <= len(data) else 0
    return tags, following
