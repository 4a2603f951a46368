"""PNG, JPEG, BMP and TIFF files: pixels equal an independent reader's, and other files are refused with a reason."""

import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from medgen.config import Preprocess
from medgen.ingest.formats.images import SUFFIXES, RasterFile, decode, inspect
from medgen.ingest.formats.raw import RawImage, UnreadableImage

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # Pillow warns of damaged files, and pytest resets the module's own filter

GREY_ONLY, COLOUR = Preprocess(), Preprocess(channels=3)

HEIGHT, WIDTH = 40, 30
ROWS, COLUMNS = np.mgrid[:HEIGHT, :WIDTH]
GREY = ((ROWS * 5 + COLUMNS * 2) % 256).astype(np.uint8)
DEEP = (GREY.astype(np.uint16) * 257) ^ 21  # 16 bits with different high and low bytes
RGB = np.dstack([GREY, GREY[::-1], 255 - GREY])
ALPHA = (COLUMNS * 8).astype(np.uint8)


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def encode_opencv(suffix: str, pixels: np.ndarray) -> bytes:
    done, data = cv2.imencode(suffix, pixels)
    assert done
    return data.tobytes()


def read(path: Path, preprocess: Preprocess = GREY_ONLY, mask: bool = False) -> RawImage:
    with RasterFile(path, preprocess, mask) as file:
        return file.read(inspect(path, preprocess).indices[0])


def luma(rgb: np.ndarray) -> np.ndarray:
    return rgb.astype(np.float64) @ [0.299, 0.587, 0.114]


TRANSPARENT = Image.fromarray(np.dstack([RGB, ALPHA]))
ONE_BIT = Image.fromarray((GREY > 127).astype(np.uint8) * 255).convert("1")
PALETTE = Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE)
PALETTE_RGB = np.asarray(PALETTE.convert("RGB"))
RGBA = luma(RGB) * ALPHA / 255

LOSSLESS = {
    "png grey": (encode(Image.fromarray(GREY), "PNG"), GREY, np.uint8, "L"),
    "png 1 bit": (encode(ONE_BIT, "PNG"), (GREY > 127) * 255, np.uint8, "1"),
    "png colour": (encode(Image.fromarray(RGB), "PNG"), luma(RGB), np.uint8, "RGB"),
    "png palette": (encode(PALETTE, "PNG"), luma(PALETTE_RGB), np.uint8, "P"),
    "png RGBA": (encode(TRANSPARENT, "PNG"), RGBA, np.uint8, "RGBA"),
    "png LA": (encode(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)]), "PNG"),
               GREY * (ALPHA / 255), np.uint8, "LA"),
    "png transparent grey": (encode(Image.fromarray(GREY), "PNG", transparency=90), np.where(GREY == 90, 0, GREY),
                             np.uint8, "L"),
    "png 16 bit": (encode(Image.fromarray(DEEP), "PNG"), DEEP, np.uint16, "I;16"),
    "png 16 bit colour": (encode_opencv(".png", np.dstack([DEEP, DEEP[::-1], DEEP // 2])),
                          luma(np.dstack([DEEP // 2, DEEP[::-1], DEEP])), np.uint16, "RGB"),
    "bmp grey": (encode(Image.fromarray(GREY), "BMP"), GREY, np.uint8, "L"),
    "bmp 1 bit": (encode(ONE_BIT, "BMP"), (GREY > 127) * 255, np.uint8, "1"),
    "bmp colour": (encode(Image.fromarray(RGB), "BMP"), luma(RGB), np.uint8, "RGB"),
    "bmp palette": (encode(PALETTE, "BMP"), luma(PALETTE_RGB), np.uint8, "P"),
    "tiff grey": (encode(Image.fromarray(GREY), "TIFF"), GREY, np.uint8, "L"),
    "tiff lzw": (encode(Image.fromarray(RGB), "TIFF", compression="tiff_lzw"), luma(RGB), np.uint8, "RGB"),
    "tiff 1 bit": (encode(ONE_BIT, "TIFF", compression="group4"), (GREY > 127) * 255, np.uint8, "1"),
    "tiff palette": (encode(PALETTE, "TIFF"), luma(PALETTE_RGB), np.uint8, "P"),
    "tiff RGBA": (encode(TRANSPARENT, "TIFF"), RGBA, np.uint8, "RGBA"),
    "tiff 16 bit": (encode(Image.fromarray(DEEP), "TIFF"), DEEP, np.uint16, "I;16"),
    "tiff 16 bit, 0 is white": (encode(Image.fromarray(DEEP), "TIFF", tiffinfo={262: 0}), 65535 - DEEP, np.uint16,
                                "I;16"),
    "tiff 16 bit colour": (encode_opencv(".tiff", np.dstack([DEEP, DEEP[::-1], DEEP // 2])),
                           luma(np.dstack([DEEP // 2, DEEP[::-1], DEEP])), np.uint16, "RGB"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_files_keep_their_pixels(name: str) -> None:
    data, expected, dtype, mode = LOSSLESS[name]
    raw = decode(data, GREY_ONLY)
    assert raw.pixels.dtype == dtype
    assert raw.mode == mode
    assert raw.size == (WIDTH, HEIGHT)
    tolerance = 1.0 if dtype == np.uint8 else 2.0  # of the luma's rounding
    assert np.abs(raw.pixels - np.asarray(expected, np.float64)).max() <= tolerance


@pytest.mark.parametrize("preprocess", [GREY_ONLY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize(
    ("format", "mode"), [("JPEG", "L"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "L"), ("TIFF", "L")]
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_colours_and_exif_orientation_are_as_in_pillow(
    format: str, mode: str, orientation: int, preprocess: Preprocess
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth = Image.fromarray(cv2.GaussianBlur(RGB, (0, 0), 4)).convert(mode)
    data = encode(smooth, format, exif=exif, **({"quality": 95} if format == "JPEG" else {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    found = decode(data, preprocess).pixels
    assert found.ndim == (3 if preprocess is COLOUR and mode != "L" else 2)
    expected = np.asarray(upright if found.ndim == 3 else upright.convert("L"), np.int32)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= (2 if format == "JPEG" else 0)


def test_deep_colour_tiff_orientation_is_applied_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = encode(Image.fromarray(DEEP), "TIFF", exif=exif)
    assert (decode(deep, GREY_ONLY).pixels == np.rot90(DEEP, -1)).all()


def test_the_content_decides_the_format(tmp_path: Path) -> None:
    path = tmp_path / "scan.JPG"
    path.write_bytes(encode(Image.fromarray(GREY), "PNG"))
    assert (read(path).pixels == GREY).all()


def test_an_alpha_channel_of_zeros_is_ignored() -> None:
    unset = np.dstack([RGB, np.zeros_like(ALPHA)])
    assert np.abs(decode(encode(Image.fromarray(unset), "PNG"), GREY_ONLY).pixels - luma(RGB)).max() <= 1.0


JPEG = encode(Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200), np.uint8)), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (b"hello", "^a text file; expected PNG, JPEG, BMP or TIFF$"),
        (encode(Image.fromarray(GREY), "GIF"), "^a GIF image: convert it to PNG; expected"),
        (bytes(128) + b"DICM" + bytes(200), "^a DICOM file; expected"),
        (bytes(range(7, 200)), "^an unknown format; expected PNG, JPEG, BMP or TIFF$"),
        (b"\x89PNG\r\n\x1a\n" + bytes(30), "damaged: its header cannot be read"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (LOSSLESS["png grey"][0][:60], "damaged|truncated"),
        (LOSSLESS["tiff grey"][0][:600], "damaged"),
        (LOSSLESS["bmp grey"][0][:1500], "truncated"),
        (encode(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "pixels of mode 'F'"),
        (encode(Image.fromarray(GREY.astype(np.int32) * 1000), "TIFF"), "expected 8 or 16 bits"),
    ],
)
def test_unreadable_files_are_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason):
        decode(data, GREY_ONLY)


def test_a_jpeg_without_its_end_marker_is_complete_or_refused() -> None:
    """Missing pixels must not become grey."""
    try:
        pixels = decode(JPEG[:-2], GREY_ONLY).pixels
    except UnreadableImage:
        return
    assert (pixels == decode(JPEG, GREY_ONLY).pixels).all()


@contextmanager
def no_more_than(mebibytes: int) -> Iterator[None]:
    """Check that the peak memory of the block stays below a limit, as Linux counts it."""
    counter = Path("/proc/self/clear_refs")
    if not counter.exists():
        pytest.skip("needs the memory counters of Linux")
    counter.write_text("5")
    before = peak_mebibytes()
    yield
    assert peak_mebibytes() - before < mebibytes


def peak_mebibytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) >> 10


def png_of(width: int, height: int, data: bytes = b"", length: int | None = None) -> bytes:
    """A grey PNG with any size in its header and any compressed data; `length` is the stated length of the data."""

    def chunk(name: bytes, content: bytes, length: int | None = None) -> bytes:
        size = struct.pack(">I", len(content) if length is None else length)
        return size + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data, length) + chunk(b"IEND", b"")


def zeros(num_rows: int, row_bytes: int) -> bytes:
    compressor = zlib.compressobj(1)
    row = bytes(1 + row_bytes)
    return b"".join([*(compressor.compress(row) for _ in range(num_rows)), compressor.flush()])


def set_tag(tiff: bytearray, old: int, new: int, value: int) -> None:
    """Replace one TIFF tag by another: number, type, count, value."""
    at = next(at for kind in (3, 4) if (at := tiff.find(struct.pack("<HHI", old, kind, 1))) > 0)
    tiff[at : at + 12] = struct.pack("<HHII", new, 4, 1, value)


def with_sides(name: str, side: int) -> bytes:
    """A small file whose header claims `side` x `side` pixels."""
    if name == "png":
        return png_of(side, side, zlib.compress(bytes(100)))
    if name == "jpeg":  # height and width follow 5 bytes after the frame marker
        data = bytearray(JPEG)
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", side, side)
    elif name == "bmp":
        data = bytearray(LOSSLESS["bmp grey"][0])
        data[18:26] = struct.pack("<ii", side, side)
    else:
        data = bytearray(LOSSLESS["tiff lzw"][0])
        set_tag(data, 256, 256, side)
        set_tag(data, 257, 257, side)
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "side"),
    [(name, side) for name in ("png", "jpeg", "bmp", "tiff") for side in (10_001, 60_000, 100_000, 2_000_000_000)
     if name != "jpeg" or side < 2**16],
)  # fmt: skip
@pytest.mark.parametrize("preprocess", [GREY_ONLY, COLOUR], ids=["grey", "colour"])
def test_a_false_size_is_refused_without_using_memory(name: str, side: int, preprocess: Preprocess) -> None:
    data = with_sides(name, side)
    with no_more_than(16), pytest.raises(UnreadableImage, match="more than 100 megapixels"):
        decode(data, preprocess)


def test_a_decompression_bomb_takes_no_more_memory_than_its_pixels() -> None:
    """100 megapixels of zeros in half a megabyte."""
    over, under = (png_of(10_000, rows, zeros(rows, 10_000)) for rows in (10_001, 10_000))
    assert len(under) < 500_000
    with no_more_than(16), pytest.raises(UnreadableImage, match="10000 x 10001 is more than 100 megapixels"):
        decode(over, GREY_ONLY)
    with no_more_than(320):
        assert decode(under, GREY_ONLY).pixels.shape == (10_000, 10_000)


@pytest.mark.parametrize("length", [100_000_000, 2**31 - 1, 2**32 - 1])
def test_a_false_chunk_length_takes_no_memory(length: int) -> None:
    data = png_of(30, 40, zlib.compress(bytes(200)), length)
    with no_more_than(16), pytest.raises(UnreadableImage, match="damaged"):
        decode(data, GREY_ONLY)


def test_large_tiff_tiles_are_refused() -> None:
    data = bytearray(LOSSLESS["tiff lzw"][0])
    set_tag(data, 278, 322, 100_000)  # rows per strip -> tile width
    set_tag(data, 279, 323, 100_000)  # strip byte counts -> tile length
    with pytest.raises(UnreadableImage, match="tiles have more than 100 megapixels"):
        decode(bytes(data), GREY_ONLY)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="No such file"):
        read(tmp_path / "absent.png")


def test_pipes_and_folders_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for a writer
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.png", "folder.png"):
        with pytest.raises(UnreadableImage, match="not a regular file"):
            read(tmp_path / name)


def test_a_file_larger_than_any_image_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(900_000_000)  # a sparse file
    with pytest.raises(UnreadableImage, match="900 MB, more than any image of 100 megapixels"):
        read(tmp_path / "large.png")


@pytest.mark.parametrize("name", ["two\nlines.png", "größe 図.png", "-rf.png", "%s{0}.png", "a\udcff.png"])
def test_files_of_any_name_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(LOSSLESS["png grey"][0])
    assert (read(tmp_path / name).pixels == GREY).all()


@pytest.mark.parametrize(("side", "scale"), [(1023, 1), (1024, 2), (2047, 2), (2048, 4), (4096, 8)])
def test_reduced_decode_keeps_enough_pixels(side: int, scale: int) -> None:
    smooth = cv2.resize(GREY, (side, side), interpolation=cv2.INTER_CUBIC)
    data = encode(Image.fromarray(smooth), "JPEG")
    raw = decode(data, Preprocess(image_size=128, reduced_decode=True))
    assert raw.pixels.shape == (-(-side // scale), -(-side // scale))
    assert raw.size == (side, side)  # of the file
    assert (
        np.abs(raw.pixels.astype(float) - cv2.resize(smooth, raw.pixels.shape, interpolation=cv2.INTER_AREA)).mean() < 1
    )


# depth and masks

TWELVE_BITS = np.asarray(DEEP >> 4, np.uint16)


def test_12_bits_in_a_16_bit_file_fill_the_range() -> None:
    data = encode(Image.fromarray(TWELVE_BITS), "PNG")
    assert (decode(data, GREY_ONLY).pixels == TWELVE_BITS << 4).all()
    colour = encode_opencv(".png", np.dstack([TWELVE_BITS, TWELVE_BITS[::-1], TWELVE_BITS // 2]))
    found = decode(colour, COLOUR).pixels
    assert (found == np.dstack([TWELVE_BITS // 2, TWELVE_BITS[::-1], TWELVE_BITS]) << 4).all()


@pytest.mark.parametrize(
    ("maximum", "shift"),
    [
        *((0, 8), (3, 8), (255, 8), (256, 7), (1023, 6), (1024, 5), (2047, 5), (2048, 4), (4095, 4), (4096, 3)),
        *((4200, 3), (8191, 3), (16383, 2), (32767, 1), (32768, 0), (65535, 0)),
    ],
)
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_every_bit_depth_fills_the_range(maximum: int, shift: int, format: str) -> None:
    pixels = np.linspace(0, maximum, GREY.size).round().astype(np.uint16).reshape(GREY.shape)
    found = decode(encode(Image.fromarray(pixels), format), GREY_ONLY).pixels
    assert np.array_equal(found, pixels.astype(int) * 2**shift)
    assert maximum < 128 or found.max() >> 8 >= 128
    assert np.array_equal(decode(encode(Image.fromarray(pixels), format), GREY_ONLY, mask=True).pixels, pixels)


def pages(*others: Image.Image, kind: int = 0) -> bytes:
    return encode(Image.fromarray(GREY), "TIFF", save_all=True, append_images=list(others), tiffinfo={254: kind})


def test_a_tiff_of_several_pages_is_refused() -> None:
    for others in ([Image.fromarray(GREY[::-1])], [Image.fromarray(RGB)] * 3):
        for mask in (False, True):
            with pytest.raises(UnreadableImage, match=r"^several pages; .*: split it \(tiffsplit\)$"):
                decode(pages(*others), GREY_ONLY, mask)


@pytest.mark.parametrize("kind", [1, 4])
def test_smaller_copies_and_masks_in_a_tiff_are_ignored(kind: int) -> None:
    assert np.array_equal(decode(pages(*[Image.fromarray(GREY[::2, ::2])] * 3, kind=kind), GREY_ONLY).pixels, GREY)


def test_damaged_links_after_the_only_page_of_a_tiff_are_ignored() -> None:
    data = encode(Image.fromarray(GREY), "TIFF")
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    for following in (start, len(data), 3, 2**32 - 1):  # itself, and offsets without a page
        looped = bytearray(data + b"junk" * 9)
        struct.pack_into("<I", looped, start + 2 + 12 * count, following)
        assert np.array_equal(decode(bytes(looped), GREY_ONLY).pixels, GREY)


def test_a_mask_keeps_its_values(tmp_path: Path) -> None:
    for number, mask in enumerate((GREY > 127, (GREY > 127) * 255)):
        for dtype in (np.uint8, np.uint16):
            path = tmp_path / f"{number}{np.dtype(dtype)}.png"
            path.write_bytes(encode(Image.fromarray(mask.astype(dtype)), "PNG"))
            for preprocess in (GREY_ONLY, COLOUR):
                assert (read(path, preprocess, mask=True).pixels == mask).all()


def test_a_mask_is_grey_and_not_reduced(tmp_path: Path) -> None:
    (tmp_path / "mask.jpg").write_bytes(encode(Image.new("RGB", (2048, 2048)), "JPEG"))
    preprocess = Preprocess(channels=3, image_size=16, reduced_decode=True)
    assert read(tmp_path / "mask.jpg", preprocess, mask=True).pixels.shape == (2048, 2048)
    assert read(tmp_path / "mask.jpg", preprocess).pixels.shape == (512, 512, 3)


# colour

DEEP_RGB = np.dstack([DEEP // 2, DEEP[::-1], DEEP])
BLENDED = RGB * (ALPHA[:, :, None] / 255)

COLOURS = {
    "png colour": RGB,
    "png palette": PALETTE_RGB,
    "png RGBA": BLENDED,
    "png 16 bit colour": DEEP_RGB,
    "bmp colour": RGB,
    "bmp palette": PALETTE_RGB,
    "tiff lzw": RGB,
    "tiff palette": PALETTE_RGB,
    "tiff RGBA": BLENDED,
    "tiff 16 bit colour": DEEP_RGB,
}


@pytest.mark.parametrize("name", COLOURS)
def test_colour_files_are_read_as_rgb(name: str) -> None:
    data, _, dtype, mode = LOSSLESS[name]
    raw = decode(data, COLOUR)
    assert (raw.pixels.dtype, raw.mode, raw.size) == (dtype, mode, (WIDTH, HEIGHT))
    assert np.abs(raw.pixels - COLOURS[name].astype(np.float64)).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("name", sorted(LOSSLESS.keys() - COLOURS.keys()))
def test_grey_files_stay_grey_with_three_channels(name: str) -> None:
    data, expected, dtype, _ = LOSSLESS[name]
    pixels = decode(data, COLOUR).pixels
    assert pixels.dtype == dtype
    expected = np.asarray(expected, np.float64)
    assert np.abs(pixels - (expected if pixels.ndim == 2 else expected[:, :, None])).max() <= 1.0


# mutations

SEEDS = [
    *(data for data, *_ in LOSSLESS.values()),
    *(encode(Image.fromarray(RGB).convert(mode), "JPEG") for mode in ("L", "RGB", "CMYK")),
    encode(Image.fromarray(RGB), "JPEG", progressive=True),
    *(encode(Image.fromarray(RGB), "TIFF", compression=name) for name in ("tiff_adobe_deflate", "jpeg", "packbits")),
    encode(Image.fromarray(RGB), "PNG", save_all=True, append_images=[Image.fromarray(RGB[::-1].copy())]),
]


@settings(derandomize=True, deadline=None, database=None, max_examples=400)
@given(
    seed=st.sampled_from(SEEDS),
    patches=st.lists(st.tuples(st.floats(0, 1), st.sampled_from([4, 1, 0, -8]), st.binary(max_size=4)), max_size=4),
    end=st.floats(0.01, 1.4),
    preprocess=st.sampled_from([GREY_ONLY, COLOUR, Preprocess(reduced_decode=True)]),
    mask=st.booleans(),
)
def test_random_damage_raises_only_unreadable_image(
    seed: bytes, patches: list[tuple[float, int, bytes]], end: float, preprocess: Preprocess, mask: bool
) -> None:
    data = bytearray(seed)
    for place, removed, put in patches:  # most changes near the beginning, where the headers are
        at = int(place**3 * len(data))
        data[at : at + max(removed, 0)] = put
    try:
        raw = decode(bytes(data[: int(end * len(data))]), preprocess, mask)
    except UnreadableImage:
        return
    assert raw.pixels.dtype in (np.uint8, np.uint16)
    assert raw.pixels.ndim == 2 or (raw.pixels.shape[2:] == (3,) and preprocess.channels == 3 and not mask)


@settings(derandomize=True, deadline=None, database=None, max_examples=50)
@given(start=st.sampled_from([b"", *(seed[:12] for seed in SEEDS)]), rest=st.binary(max_size=300))
def test_random_bytes_are_refused(start: bytes, rest: bytes) -> None:
    with pytest.raises(UnreadableImage):
        decode(start + rest, GREY_ONLY)


# real files


def blended(path: Path) -> Image.Image:
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("RGBA", "LA", "P"):
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "black"), upright)
        return upright.convert("RGB")


def test_real_unusual_files(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shared_data("quirks")
    paths = [path for path in sorted(folder.rglob("*.*")) if path.suffix.lower() in SUFFIXES]
    assert len(paths) == 30
    for path in paths:
        if path.parent.name == "lfs_pointer":
            with pytest.raises(UnreadableImage, match=r"^a Git LFS pointer instead of the file"):
                read(path)
            continue
        colours = blended(path)
        for preprocess, expected in ((GREY_ONLY, colours.convert("L")), (COLOUR, colours)):
            found = read(path, preprocess).pixels
            reference = np.asarray(expected, np.int32)
            if found.ndim == 2 and reference.ndim == 3:
                found = np.dstack([found] * 3)
            assert found.shape == reference.shape, path
            assert np.abs(found - reference).mean() < 1.0, path
    shutil.copy(folder / "truncated_weights" / "resnet18-5c106cde.pth", tmp_path / "weights.png")
    with pytest.raises(UnreadableImage, match=r"^a tar archive: unpack it; expected"):
        read(tmp_path / "weights.png")
