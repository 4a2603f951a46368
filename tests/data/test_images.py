"""Every readable kind of file gives the pixels that an independent reader gives, and every other a reason."""

import io
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from medgen.data import images
from medgen.data.images import UnreadableImage, decode, looks_like_image, mask_to_square, read_image, to_square

HEIGHT, WIDTH = 40, 30
ROWS, COLUMNS = np.mgrid[:HEIGHT, :WIDTH]
GREY = ((ROWS * 5 + COLUMNS * 2) % 256).astype(np.uint8)
DEEP = (GREY.astype(np.uint16) * 257) ^ 21  # 16 bits whose low byte is not the high one
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
def test_lossless_files_give_their_pixels(name: str) -> None:
    data, expected, dtype, mode = LOSSLESS[name]
    raw = decode(data)
    assert raw.pixels.dtype == dtype
    assert raw.mode == mode
    assert raw.size == (WIDTH, HEIGHT)
    assert np.abs(raw.pixels - np.asarray(expected, np.float64)).max() <= (
        1.0 if dtype == np.uint8 else 2.0
    )  # of the luma's rounding


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_is_near_pillows_reading(mode: str) -> None:
    smooth = Image.fromarray(cv2.GaussianBlur(RGB, (0, 0), 4)).convert(mode)
    data = encode(smooth, "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB").convert("L"), np.int32)
    assert np.abs(decode(data).pixels - expected).max() <= 2


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(cv2.GaussianBlur(GREY, (0, 0), 4)), format, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))), np.int32)
    raw = decode(data)
    assert raw.pixels.shape == expected.shape
    assert np.abs(raw.pixels - expected).max() <= 1


def test_deep_colour_tiff_orientation_is_applied_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = encode(Image.fromarray(DEEP), "TIFF", exif=exif)
    assert (decode(deep).pixels == np.rot90(DEEP, -1)).all()


def test_content_decides_and_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "scan.JPG"
    path.write_bytes(encode(Image.fromarray(GREY), "PNG"))
    assert (read_image(path).pixels == GREY).all()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.PNG", b"", True),
        ("a.Tiff", b"", True),
        ("a", LOSSLESS["png grey"][0], True),
        ("a.dat", LOSSLESS["png grey"][0], True),
        ("a.txt", b"BM is how this text begins", False),
        ("a.csv", b"path,label", False),
        ("a", b"", False),
    ],
)
def test_what_looks_like_an_image(tmp_path: Path, name: str, content: bytes, expected: bool) -> None:
    (tmp_path / name).write_bytes(content)
    assert looks_like_image(tmp_path / name) is expected


def test_alpha_that_was_never_set_is_ignored() -> None:
    unset = np.dstack([RGB, np.zeros_like(ALPHA)])
    assert np.abs(decode(encode(Image.fromarray(unset), "PNG")).pixels - luma(RGB)).max() <= 1.0


JPEG = encode(Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200), np.uint8)), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (b"hello", "no PNG, JPEG, BMP or TIFF"),
        (encode(Image.fromarray(GREY), "GIF"), "no PNG, JPEG, BMP or TIFF"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (LOSSLESS["png grey"][0][:60], "damaged|truncated"),
        (LOSSLESS["tiff grey"][0][:600], "damaged"),
        (LOSSLESS["bmp grey"][0][:1500], "truncated"),
        (encode(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "pixels of kind 'F'"),
        (encode(Image.fromarray(GREY.astype(np.int32) * 1000), "TIFF"), "expected 8 or 16 bits"),
    ],
)
def test_unreadable_files_give_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason):
        decode(data)


def test_a_jpeg_that_lacks_only_its_end_marker_is_judged_by_its_pixels() -> None:
    """Never a picture silently filled up with grey: whole, or a reason."""
    try:
        pixels = decode(JPEG[:-2]).pixels
    except UnreadableImage:
        return
    assert (pixels == decode(JPEG).pixels).all()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_001, 100_000])
def test_a_decompression_bomb_is_refused_by_its_header(side: int) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    data = LOSSLESS["png grey"][0][:12] + header + struct.pack(">I", zlib.crc32(header)) + LOSSLESS["png grey"][0][33:]
    with pytest.raises(UnreadableImage, match="more than 100 megapixels"):
        decode(data)


def test_a_missing_file_gives_a_reason(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="No such file"):
        read_image(tmp_path / "absent.png")


@pytest.mark.parametrize(("side", "scale"), [(1023, 1), (1024, 2), (2047, 2), (2048, 4), (4096, 8)])
def test_reduced_decode_keeps_enough_pixels(side: int, scale: int) -> None:
    smooth = cv2.resize(GREY, (side, side), interpolation=cv2.INTER_CUBIC)
    data = encode(Image.fromarray(smooth), "JPEG")
    raw = decode(data, reduce_to=128)
    assert raw.pixels.shape == (-(-side // scale), -(-side // scale))
    assert raw.size == (side, side)  # of the file
    assert (
        np.abs(raw.pixels.astype(float) - cv2.resize(smooth, raw.pixels.shape, interpolation=cv2.INTER_AREA)).mean() < 1
    )


# squares


def test_square_is_clahe_then_area_resize() -> None:
    picture = np.asarray(np.random.default_rng(0).integers(0, 255, (96, 96)), np.uint8)
    equalised = cv2.createCLAHE(2.0, (8, 8)).apply(picture)
    expected = equalised.reshape(32, 3, 32, 3).mean(axis=(1, 3))  # what area resampling means
    found = to_square(picture, 32, "squash", 2.0, 8)
    assert found.dtype == np.uint8
    assert np.abs(found - expected).max() <= 0.5 + 1e-9


def test_pad_keeps_the_aspect_between_black_borders() -> None:
    square = to_square(np.full((40, 80), 200, np.uint8), 32, "pad", 0.0, 8)
    assert (square[:8] == 0).all()
    assert (square[-8:] == 0).all()
    assert (square[8:24] == 200).all()
    assert (to_square(np.full((40, 80), 200, np.uint8), 32, "squash", 0.0, 8) == 200).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (7, 5), (2, 2)])
@pytest.mark.parametrize("fit", ["pad", "squash"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_any_shape_becomes_a_square(shape: tuple[int, int], fit: str, dtype: type) -> None:
    square = to_square(np.full(shape, 100, dtype), 16, fit, 2.0, 8)  # type: ignore[arg-type]
    assert square.shape == (16, 16)
    assert square.dtype == np.uint8


def test_16_bit_pictures_use_their_whole_range() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    assert np.abs(to_square(ramp, 64, "pad", 0.0, 8) - ramp / 257).max() <= 0.5 + 1e-6
    twelve_bits = ramp >> 4
    assert np.abs(to_square(twelve_bits, 64, "pad", 0.0, 8) - ramp / 257.0).max() <= 1.0


def test_clahe_means_the_same_at_16_bits_as_at_8() -> None:
    """A contrast limit counts pixels a bin; with 65,536 bins it would be no limit and amplify noise."""
    generator = np.random.default_rng(0)
    smooth = cv2.GaussianBlur(generator.normal(0.5, 3.0, (512, 512)), (0, 0), 20).clip(0, 1)
    noisy = (smooth * 60000 + generator.normal(0, 200, smooth.shape)).clip(0, 65535).astype(np.uint16)
    at_16 = to_square(noisy, 64, "pad", 2.0, 8).astype(float)
    at_8 = to_square((noisy >> 8).astype(np.uint8), 64, "pad", 2.0, 8)
    assert np.abs(at_16 - at_8).mean() < 3.0


@pytest.mark.parametrize("bright", [1, 255])
def test_masks_are_0_and_1_and_lie_as_their_image(bright: int) -> None:
    mask = np.zeros((40, 80), np.uint8)
    mask[:, 40:] = bright
    square = mask_to_square(mask, 32, "pad")
    expected = np.zeros((32, 32), np.uint8)
    expected[8:24, 16:] = 1
    assert (square == expected).all()


def test_smoothed_masks_are_cut_at_the_middle() -> None:
    assert (mask_to_square(np.array([[0, 127, 128, 255]] * 4, np.uint8), 4, "pad") == [0, 0, 1, 1]).all()


def test_a_mask_of_class_numbers_is_refused() -> None:
    with pytest.raises(UnreadableImage, match="reach 3"):
        mask_to_square(np.array([[0, 1, 2, 3]], np.uint8), 16, "pad")


# real files


def test_real_odd_files(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shared_data("quirks")
    for path in sorted(folder.rglob("*.*")):
        if not path.is_file() or path.suffix.lower() not in images.SUFFIXES or path.parent.name == "lfs_pointer":
            continue
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("RGBA", "LA", "P"):
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "black"), upright)
            expected = np.asarray(upright.convert("RGB").convert("L"), np.int32)
        found = read_image(path).pixels
        assert found.shape == expected.shape, path
        assert np.abs(found - expected).mean() < 1.0, path
    with pytest.raises(UnreadableImage, match="Git LFS"):
        read_image(folder / "lfs_pointer" / "case_001_slice_0.nii.png")
    shutil.copy(folder / "truncated_weights" / "resnet18-5c106cde.pth", tmp_path / "weights.png")
    with pytest.raises(UnreadableImage):
        read_image(tmp_path / "weights.png")
