"""Decoding: every odd file is decoded right or refused with a reason; none becomes a silently wrong picture."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from edgead.runtime.errors import ImageError, InputError, StorageError
from edgead.runtime.image import decode, encode_jpeg, encode_png, list_images, read_image
from edgead.runtime.spec import Limits

Frame = NDArray[np.uint8]


def photograph(height: int = 48, width: int = 64) -> Frame:
    """A smooth, colourful frame without any symmetry, so that a flip or swapped channel shows."""
    generator = np.random.default_rng(7)
    coarse = generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)


FRAME = photograph()
PICTURE = Image.fromarray(FRAME)


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def with_alpha(picture: Image.Image) -> Image.Image:
    alpha = np.tile(np.linspace(0, 255, picture.width, dtype=np.uint8), (picture.height, 1))
    picture = picture.copy()
    picture.putalpha(Image.fromarray(alpha))
    return picture


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, *, bits: int = 8, colour: int = 0, before: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + before + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def pillow(data: bytes) -> Frame:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


PALETTE = PICTURE.quantize(16)
EXACT = {
    "png": saved(PICTURE, "PNG"),
    "grey png": saved(PICTURE.convert("L"), "PNG"),
    "palette png": saved(PALETTE, "PNG"),
    "palette png of 4 bits": saved(PALETTE, "PNG", bits=4),
    "1-bit png": saved(PICTURE.convert("1"), "PNG"),
    "bmp": saved(PICTURE, "BMP"),
    "palette bmp": saved(PALETTE, "BMP"),
    "1-bit bmp": saved(PICTURE.convert("1"), "BMP"),
    "bmp with alpha": saved(with_alpha(PICTURE), "BMP"),
    "tiff": saved(PICTURE, "TIFF"),
    "lzw tiff": saved(PICTURE, "TIFF", compression="tiff_lzw"),
    "deflate tiff": saved(PICTURE, "TIFF", compression="tiff_adobe_deflate"),
    "packbits tiff": saved(PICTURE, "TIFF", compression="packbits"),
    "grey tiff": saved(PICTURE.convert("L"), "TIFF"),
    "palette tiff": saved(PALETTE, "TIFF"),
    "1-bit tiff": saved(PICTURE.convert("1"), "TIFF"),
    "lossless webp": saved(PICTURE, "WEBP", lossless=True),
    "jpeg": saved(PICTURE, "JPEG", quality=95),
    "progressive jpeg": saved(PICTURE, "JPEG", quality=95, progressive=True),
    "jpeg with restarts": saved(PICTURE, "JPEG", quality=95, restart_marker_blocks=2),
    "jpeg without subsampling": saved(PICTURE, "JPEG", quality=95, subsampling=0),
    "grey jpeg": saved(PICTURE.convert("L"), "JPEG", quality=95),
    "webp": saved(PICTURE, "WEBP", quality=90),
}
LOSSY = {"jpeg in tiff": saved(PICTURE, "TIFF", compression="jpeg", quality=95)}


@pytest.mark.parametrize("kind", EXACT)
def test_a_usual_file_decodes_to_the_pixels_another_decoder_sees(kind: str) -> None:
    seen, expected = decode(EXACT[kind]), pillow(EXACT[kind])
    assert seen.dtype == np.uint8
    assert seen.shape == FRAME.shape
    # Lossy decoders may differ by one in their rounding.
    assert np.abs(seen.astype(int) - expected).max() <= (2 if "webp" in kind else 1 if "jpeg" in kind else 0)


def test_jpeg_inside_tiff_is_close_to_what_was_saved() -> None:
    seen = decode(LOSSY["jpeg in tiff"])
    assert np.abs(seen.astype(int) - FRAME).mean() < 3


@pytest.mark.parametrize("grey", [True, False])
@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_16_bits_keep_their_upper_8(suffix: str, grey: bool) -> None:
    deep = np.random.default_rng(1).integers(0, 65536, (48, 64) if grey else (48, 64, 3)).astype(np.uint16)
    seen = decode(bytes(cv2.imencode(suffix, deep)[1]))
    expected = np.repeat(deep[..., None], 3, axis=2) if grey else deep[..., ::-1]
    np.testing.assert_array_equal(seen, expected >> 8)


@pytest.mark.parametrize(
    "data",
    [
        saved(with_alpha(PICTURE), "PNG"),
        saved(with_alpha(PICTURE), "WEBP", lossless=True, exact=True),
        saved(PICTURE, "PNG", transparency=(1, 2, 3)),
    ],
    ids=["png", "webp", "png with a transparent colour"],
)
def test_alpha_is_dropped_and_the_colours_stay_as_stored(data: bytes) -> None:
    np.testing.assert_array_equal(decode(data), FRAME)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    choices: dict[str, dict[str, object]] = {"JPEG": {"quality": 95}, "PNG": {}, "WEBP": {"lossless": True}}
    options = choices[kind]
    data = saved(PICTURE, kind, exif=exif, **options)
    seen, expected = decode(data), pillow(data)
    assert seen.shape == expected.shape
    assert np.abs(seen.astype(int) - expected).max() <= 1


def test_nonsense_in_exif_does_not_turn_the_picture() -> None:
    exif = Image.Exif()
    exif[274] = 9
    np.testing.assert_array_equal(decode(saved(PICTURE, "PNG", exif=exif)), FRAME)
    broken = png(2, 1, b"\0\x05\x06", before=chunk(b"eXIf", b"II*\0\xff\xff\xff\x7f"))
    assert decode(broken)[0, :, 0].tolist() == [5, 6]


def test_one_pixel_is_a_picture() -> None:
    assert decode(png(1, 1, b"\0\x80")).tolist() == [[[128, 128, 128]]]


def test_a_picture_larger_than_one_band_has_its_channels_in_order_everywhere() -> None:
    tall = np.zeros((5000, 1000, 3), np.uint8)
    tall[:, :, 0] = np.arange(5000, dtype=np.uint32)[:, None] % 251
    np.testing.assert_array_equal(decode(encode_png(tall)), tall)


@pytest.mark.parametrize("name", ["photo.png", "photo.jpg", "photo.txt"])
def test_content_decides_and_not_the_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(EXACT["lossless webp"])
    np.testing.assert_array_equal(read_image(tmp_path / name), FRAME)


def animated(kind: str) -> bytes:
    return saved(PICTURE, kind, save_all=True, append_images=[PICTURE.transpose(Image.Transpose.ROTATE_180)])


def turned_tiff() -> bytes:
    exif = Image.Exif()
    exif[274] = 6
    return saved(PICTURE, "TIFF", exif=exif)


REFUSED = {
    "an empty file": (b"", "an empty file"),
    "text": (b"hello, world", "unknown content"),
    "a web page": (b"<!DOCTYPE html><html>sign in</html>", "a web page"),
    "gif": (saved(PALETTE, "GIF"), "a GIF"),
    "animated gif": (animated("GIF"), "a GIF"),
    "animated png": (animated("PNG"), "an animation"),
    "animated webp": (animated("WEBP"), "an animation"),
    "tiff of two pages": (animated("TIFF"), "several pages"),
    "jpeg 2000": (saved(PICTURE, "JPEG2000"), "JPEG 2000"),
    "avif": (b"\0\0\0\x20ftypavif", "AVIF"),
    "cmyk jpeg": (saved(PICTURE.convert("CMYK"), "JPEG"), "CMYK"),
    "cmyk tiff": (saved(PICTURE.convert("CMYK"), "TIFF"), "CMYK"),
    "tiff with alpha": (saved(with_alpha(PICTURE), "TIFF"), "alpha"),
    "float tiff": (saved(PICTURE.convert("F"), "TIFF"), "floating point"),
    "signed tiff": (saved(PICTURE.convert("I"), "TIFF"), "signed"),
    "turned tiff": (turned_tiff(), "orientation 6"),
    "bmp of 16 bits": (EXACT["bmp"][:28] + b"\x10\0" + EXACT["bmp"][30:], "16 bits"),
    "a png without data": (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)) + chunk(b"IEND", b""),
        "truncated",
    ),
    "a png of too few rows": (png(8, 8, b"\0" * 27), "damaged"),
    "a png of no width": (png(0, 8, b"\0" * 8), "0 x 8"),
    "a png with a flipped bit": (
        EXACT["png"][:900] + bytes([EXACT["png"][900] ^ 4]) + EXACT["png"][901:],
        "checksum",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_not_decode_exactly_is_refused_with_the_reason(kind: str) -> None:
    data, reason = REFUSED[kind]
    with pytest.raises(ImageError, match=reason) as caught:
        decode(data, name="odd.png")
    assert "odd.png" in caught.value.wanted
    assert caught.value.next_step


@pytest.mark.parametrize("kind", [*EXACT, *LOSSY])
def test_a_truncated_file_is_never_a_picture(kind: str) -> None:
    data = {**EXACT, **LOSSY}[kind]
    # The very last bytes of a WebP, TIFF or BMP can be padding or metadata; most of the file cannot.
    for end in {1, 2, 3, 9, 20, 33, len(data) // 3, len(data) // 2, len(data) * 9 // 10}:
        with pytest.raises(ImageError):
            decode(data[:end])


def test_a_jpeg_without_its_last_bytes_is_refused_although_its_thumbnail_is_whole() -> None:
    thumbnail = saved(PICTURE.resize((16, 12)), "JPEG")
    exif = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + thumbnail
    data = EXACT["jpeg"][:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + EXACT["jpeg"][2:]
    assert np.abs(decode(data).astype(int) - FRAME).mean() < 3
    for cut in (1, 2, 40, 400):
        with pytest.raises(ImageError, match="truncated"):
            decode(data[:-cut])


def test_what_a_camera_appends_behind_a_jpeg_is_ignored() -> None:
    np.testing.assert_array_equal(decode(EXACT["jpeg"] + b"\0" * 100), decode(EXACT["jpeg"]))


def test_sizes_over_the_limit_are_refused_from_the_header_alone() -> None:
    bomb = png(20001, 20000, b"")
    with pytest.raises(ImageError, match="20001 x 20000 pixels"):
        decode(bomb)
    with pytest.raises(ImageError, match="pixels"):
        decode(png(70000, 1, b""))
    small = Limits(image_pixels=64 * 48 - 1)
    for kind, data in EXACT.items():
        with pytest.raises(ImageError, match="pixels, more than the limit"):
            decode(data, limits=small)
        assert decode(data, limits=Limits(image_pixels=64 * 48)).shape == FRAME.shape, kind


@pytest.mark.slow
def test_a_large_picture_within_the_limit_decodes() -> None:
    side = 20000
    rows = zlib.compressobj(1)
    row = b"\0" + b"\xaa" * (side // 8)
    data = b"".join(rows.compress(row * 500) for _ in range(side // 500)) + rows.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    frame = decode(bomb)
    assert frame.shape == (side, side, 3)
    assert frame[-1, -2:].tolist() == [[255] * 3, [0] * 3]


def test_a_file_over_the_byte_limit_is_not_read_to_its_end(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="limit of 1000 bytes"):
        read_image("/dev/zero", Limits(image_bytes=1000))


def test_a_missing_file_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        read_image(tmp_path / "nowhere.png")
    with pytest.raises(StorageError):
        read_image(tmp_path)


def test_a_tiff_that_claims_endless_tags_is_refused_at_once() -> None:
    count = 1_500_000
    entries = b"".join(struct.pack("<HHII", 273, 1, count, 8) for _ in range(4000))
    with pytest.raises(ImageError, match="damaged TIFF"):
        decode(b"II*\0\x08\0\0\0" + struct.pack("<H", 4000) + entries + b"\0" * count)
    repeated = struct.pack("<HHII", 273, 1, 1, 8) * 2
    with pytest.raises(ImageError, match="damaged TIFF"):
        decode(b"II*\0\x08\0\0\0" + struct.pack("<H", 2) + repeated + b"\0" * 4)


def test_a_tiff_whose_strips_lie_outside_it_is_refused_before_decoding() -> None:
    with pytest.raises(ImageError, match="truncated"):
        decode(EXACT["tiff"][:-100])


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = EXACT["progressive jpeg"]
    last = data.rfind(b"\xff\xda")
    scan = data[last:-2]
    with pytest.raises(ImageError):
        decode(data[:-2] + scan * 200 + data[-2:])


SEEDS = [EXACT[kind] for kind in ("png", "progressive jpeg", "bmp", "lzw tiff", "webp", "palette tiff")]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6))
def test_any_damage_gives_a_frame_or_an_image_error(data: bytes, damage: list[tuple[int, int]]) -> None:
    broken = bytearray(data)
    for place, value in damage:
        broken[place % len(broken)] = value
    try:
        frame = decode(bytes(broken), limits=Limits(image_pixels=2**20))
    except ImageError:
        return
    assert frame.dtype == np.uint8
    assert frame.ndim == 3
    assert frame.shape[2] == 3


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", *(seed[:30] for seed in SEEDS)]))
def test_any_bytes_give_an_image_error(tail: bytes, head: bytes) -> None:
    with pytest.raises(ImageError):
        decode(head + tail, limits=Limits(image_pixels=2**20))


@pytest.mark.parametrize("encode", [encode_png, encode_jpeg])
def test_what_is_encoded_decodes_again_in_the_same_orientation(encode: Callable[[Frame], bytes]) -> None:
    assert np.abs(decode(encode(FRAME)).astype(int) - FRAME).mean() < 4
    assert encode(FRAME) == encode(FRAME.copy())


@pytest.mark.parametrize(
    "frame", [np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.int64)]
)
def test_what_is_no_frame_is_not_encoded(frame: Frame) -> None:
    for encode in (encode_png, encode_jpeg):
        with pytest.raises(ImageError):
            encode(frame)


def test_images_are_listed_in_order_without_hidden_files(tmp_path: Path) -> None:
    names = ["b/2.JPG", "a.png", "b/1.tiff", ".hidden.png", ".thumbs/x.png", "b/notes.txt", "c.png/deep.bmp"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert found == ["a.png", "b/1.tiff", "b/2.JPG", "c.png/deep.bmp"]


def test_a_folder_without_images_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none"):
        list_images(tmp_path)
    with pytest.raises(InputError, match="nothing there"):
        list_images(tmp_path / "no")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="a file"):
        list_images(tmp_path / "file")
