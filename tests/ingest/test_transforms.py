"""Image transforms: CLAHE before the resize, black borders, masks aligned with their images, grey and RGB."""

from typing import Literal

import cv2
import numpy as np
import pytest

from medgen.config import Preprocess
from medgen.ingest.formats.raw import RawImage, UnreadableImage
from medgen.ingest.transforms import preprocess_image, preprocess_mask, preprocess_raw, resize_mask


def settings(
    image_size: int, fit: Literal["pad", "squash"] = "pad", clip: float = 2.0, channels: int = 1
) -> Preprocess:
    return Preprocess(image_size=image_size, fit=fit, clahe_clip=clip, channels=channels)  # type: ignore[arg-type]


def test_clahe_is_applied_before_the_area_resize() -> None:
    image = np.asarray(np.random.default_rng(0).integers(0, 255, (96, 96)), np.uint8)
    equalised = cv2.createCLAHE(2.0, (8, 8)).apply(image)
    expected = equalised.reshape(32, 3, 32, 3).mean(axis=(1, 3))  # the definition of area resampling
    found = preprocess_image(image, settings(32, "squash", 2.0))[0]
    assert found.dtype == np.uint8
    assert np.abs(found - expected).max() <= 0.5 + 1e-9


def test_pad_keeps_the_aspect_ratio_and_adds_black_borders() -> None:
    square = preprocess_image(np.full((40, 80), 200, np.uint8), settings(32, "pad", 0.0))[0]
    assert (square[:8] == 0).all()
    assert (square[-8:] == 0).all()
    assert (square[8:24] == 200).all()
    assert (preprocess_image(np.full((40, 80), 200, np.uint8), settings(32, "squash", 0.0))[0] == 200).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (7, 5), (2, 2)])
@pytest.mark.parametrize("fit", ["pad", "squash"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_shape_becomes_a_square(
    shape: tuple[int, int], fit: Literal["pad", "squash"], dtype: type, channels: int
) -> None:
    for pixels in (np.full(shape, 100, dtype), np.full((*shape, 3), 100, dtype)):
        square = preprocess_image(pixels, settings(16, fit, channels=channels))
        assert square.shape == (channels, 16, 16)
        assert square.dtype == np.uint8
        assert square.flags.c_contiguous and square.flags.writeable


@pytest.mark.parametrize("sides", [(16, 40), (40, 16)])
@pytest.mark.parametrize("fit", ["pad", "squash"])
def test_images_that_are_not_square(sides: tuple[int, int], fit: Literal["pad", "squash"]) -> None:
    """Height first; an image of this aspect ratio has no borders, and a mask gets the same geometry."""
    preprocess = Preprocess(image_size=sides, fit=fit, clahe_clip=0.0)
    pixels = np.full((2 * sides[0], 2 * sides[1]), 200, np.uint8)
    pixels[: sides[0], : sides[1]] = 100
    expected = pixels[::2, ::2]
    assert np.array_equal(preprocess_image(pixels, preprocess)[0], expected)
    assert np.array_equal(resize_mask((pixels == 200).astype(np.uint8), preprocess)[0], expected == 200)
    tall = preprocess_image(np.full((100, 10), 200, np.uint8), preprocess)[0]
    assert tall.shape == sides
    assert (tall == 200).all() == (fit == "squash")
    assert set(np.unique(tall[0])) == ({0, 200} if fit == "pad" else {200})  # borders at the left and right only


def test_16_bit_images_are_scaled_to_8_bits() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    assert np.abs(preprocess_image(ramp, settings(64, "pad", 0.0))[0] - ramp / 257).max() <= 0.5 + 1e-6


def test_clahe_has_the_same_effect_at_16_bits_as_at_8() -> None:
    """The contrast limit is in pixels per bin; with 65,536 bins it would not limit anything and amplify noise."""
    generator = np.random.default_rng(0)
    smooth = cv2.GaussianBlur(generator.normal(0.5, 3.0, (512, 512)), (0, 0), 20).clip(0, 1)
    noisy = (smooth * 60000 + generator.normal(0, 200, smooth.shape)).clip(0, 65535).astype(np.uint16)
    at_16 = preprocess_image(noisy, settings(64, "pad", 2.0))[0].astype(float)
    at_8 = preprocess_image((noisy >> 8).astype(np.uint8), settings(64))[0]
    assert np.abs(at_16 - at_8).mean() < 3.0


@pytest.mark.parametrize(("dtype", "bright"), [(np.uint8, 1), (np.uint8, 255), (np.uint16, 1), (np.uint16, 65535)])
def test_binary_masks_are_0_and_1_and_aligned_with_their_image(dtype: type, bright: int) -> None:
    mask = np.zeros((40, 80), dtype)
    mask[:, 40:] = bright
    square = resize_mask(mask, settings(32, channels=3))
    assert square.shape == (1, 32, 32)
    expected = np.zeros((32, 32), np.uint8)
    expected[8:24, 16:] = 1
    assert (square == expected).all()


@pytest.mark.parametrize(("dtype", "values"), [(np.uint8, (0, 127, 128, 255)), (np.uint16, (0, 32767, 32768, 65535))])
def test_smoothed_masks_are_thresholded_at_the_middle(dtype: type, values: tuple[int, ...]) -> None:
    mask = np.repeat(np.array([values] * 16, dtype), 4, axis=1)
    assert (resize_mask(mask, settings(16)) == np.repeat([0, 0, 1, 1], 4)).all()


def test_a_mask_of_more_classes_is_refused_without_mask_values() -> None:
    with pytest.raises(UnreadableImage, match="reach 3"):
        resize_mask(np.array([[0, 1, 2, 3]], np.uint8), settings(16))


# colour

LIGHT = cv2.GaussianBlur(np.random.default_rng(0).normal(0, 60, (64, 64)), (0, 0), 3)
TINTS = np.dstack(np.broadcast_arrays(np.linspace(120, 100, 64), 110.0, np.linspace(95, 125, 64)[:, None]))
COLOURS = np.rint(TINTS + LIGHT[:, :, None]).astype(np.uint8)


@pytest.mark.parametrize("scale", [1, 257], ids=["8 bits", "16 bits"])
def test_clahe_changes_the_luma_of_colours_and_not_their_hue(scale: int) -> None:
    pixels = COLOURS.astype(np.uint16) * scale if scale > 1 else COLOURS
    plain = preprocess_image(pixels, settings(64, clip=0.0, channels=3)).astype(float)
    assert np.abs(plain - COLOURS.transpose(2, 0, 1)).max() <= 0.5
    square = preprocess_image(pixels, settings(64, channels=3)).astype(float)
    luma, before = (np.tensordot([0.299, 0.587, 0.114], image, 1) for image in (square, plain))
    assert luma.std() > 1.2 * before.std()
    for channel in (0, 2):  # the chroma, red or blue minus luma, is unchanged
        assert np.abs((square[channel] - luma) - (plain[channel] - before)).max() <= 2.0
    grey = preprocess_image(np.rint(before).astype(np.uint8), settings(64))[0]
    if scale == 1:  # the luma is equalised like the same grey image
        assert np.abs(luma - grey).mean() <= 1.5


def test_grey_images_become_three_equal_channels() -> None:
    grey = np.asarray(np.random.default_rng(0).integers(0, 255, (50, 96)), np.uint8)
    square = preprocess_image(grey, settings(32, channels=3))
    assert (square == preprocess_image(grey, settings(32))).all()
    as_colour = preprocess_image(np.dstack([grey] * 3), settings(32, channels=3))
    assert np.abs(as_colour.astype(int) - square).max() <= 1


def test_colour_becomes_luma_for_one_channel() -> None:
    grey = np.rint(COLOURS @ [0.299, 0.587, 0.114]).astype(np.uint8)
    square, expected = (preprocess_image(pixels, settings(64, clip=0.0)).astype(int) for pixels in (COLOURS, grey))
    assert np.abs(square - expected).max() <= 1


def test_borders_of_colour_images_are_black() -> None:
    square = preprocess_image(np.full((40, 80, 3), (200, 100, 50), np.uint8), settings(32, "pad", 0.0, channels=3))
    assert (square[:, :8] == 0).all()
    assert (square[:, 8:24] == np.array([200, 100, 50])[:, None, None]).all()


# masks with mask_values


@pytest.mark.parametrize(
    ("dtype", "values"),
    [(np.uint8, (0, 85, 170, 255)), (np.uint8, (2, 1, 3, 0)), (np.uint16, (0, 9, 700, 65535))],
)
def test_class_numbers_depend_only_on_mask_values(dtype: type, values: tuple[int, ...]) -> None:
    options = Preprocess(image_size=32, mask_values=values)
    assert options.mask_classes == 4
    mask = np.repeat(np.array([values] * 64, dtype), 16, axis=1)
    assert (resize_mask(mask, options)[0] == np.repeat(range(4), 8)).all()
    for number, value in enumerate(values):
        assert (resize_mask(np.full((40, 40), value, dtype), options) == number).all()


def test_a_pixel_has_the_most_common_class_of_its_area() -> None:
    mask = np.random.default_rng(0).integers(0, 3, (96, 96)).astype(np.uint8)
    blocks = mask.reshape(32, 3, 32, 3).transpose(0, 2, 1, 3).reshape(32, 32, 9)
    expected = np.apply_along_axis(lambda block: np.bincount(block, minlength=3).argmax(), 2, blocks)
    assert (resize_mask(mask, Preprocess(image_size=32, mask_values=(0, 1, 2)))[0] == expected).all()


def test_borders_have_the_first_class() -> None:
    square = resize_mask(np.full((40, 80), 3, np.uint8), Preprocess(image_size=32, mask_values=(2, 1, 3)))[0]
    assert (square[8:24] == 2).all() and (square[:8] == 0).all()


def test_an_unknown_mask_value_is_refused() -> None:
    with pytest.raises(UnreadableImage, match=r"mask values 84, 90; expected .* \[0, 85, 170, 255\]"):
        resize_mask(np.array([[0, 84, 90]], np.uint8), Preprocess(image_size=16, mask_values=(0, 85, 170, 255)))


def volume(pixels: np.ndarray, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> RawImage:
    return RawImage(pixels, pixels.shape[:0:-1], "uint16", spacing)


def test_a_voxel_is_the_mean_of_the_voxels_it_covers() -> None:
    pixels = np.random.default_rng(0).integers(0, 65535, (32, 48, 64)).astype(np.uint16)
    settings = Preprocess(image_size=(16, 16, 16), fit="squash", clahe_clip=0.0, bits=16)
    found = preprocess_raw(volume(pixels), settings)
    expected = pixels.reshape(16, 2, 16, 3, 16, 4).mean(axis=(1, 3, 5))
    assert found.shape == (1, 16, 16, 16) and found.dtype == np.uint16
    assert np.abs(found[0] - expected).max() <= 1.0  # rounded after each of the two passes
    bytes_found = preprocess_raw(volume(pixels), settings.model_copy(update={"bits": 8}))
    assert bytes_found.dtype == np.uint8 and np.abs(bytes_found[0] - expected / 257).max() <= 0.51


def test_pad_keeps_the_proportions_in_millimetres_and_masks_their_place() -> None:
    """10 slices of 4 mm are as long as 40 rows of 1 mm; 20 columns are half as long."""
    pixels = np.full((10, 40, 20), 65535, np.uint16)
    settings = Preprocess(image_size=(16, 16, 16), clahe_clip=0.0)
    found = preprocess_raw(volume(pixels, (4.0, 1.0, 1.0)), settings)[0]
    expected = np.zeros((16, 16, 16), np.uint8)
    expected[:, :, 4:12] = 255
    assert np.array_equal(found, expected)
    mask = volume(np.full((10, 40, 20), 255, np.uint8), (4.0, 1.0, 1.0))
    assert np.array_equal(preprocess_mask(mask, mask, "m", settings)[0], expected == 255)
    classes = settings.model_copy(update={"mask_values": (0, 255)})
    assert np.array_equal(preprocess_mask(mask, mask, "m", classes)[0], expected == 255)
    with pytest.raises(UnreadableImage, match="mask m is 20 x 40"):
        preprocess_mask(mask, volume(pixels, (2.0, 1.0, 1.0)), "m", settings)


def test_volumes_have_no_clahe_and_no_colours() -> None:
    with pytest.raises(ValueError, match="clahe_clip to 0 and channels to 1"):
        Preprocess(image_size=(16, 16, 16))
    with pytest.raises(ValueError, match="found 1073741824 voxels; expected at most"):
        Preprocess(image_size=(1024, 1024, 1024), clahe_clip=0.0)
