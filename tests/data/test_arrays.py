"""Image arrays from a user's code: the accepted shapes, types and ranges, and the errors for others."""

import numpy as np
import pytest

from medgen.data.arrays import check_images
from medgen.errors import UserError

GREY, COLOUR = (1, 4, 6), (3, 4, 6)


@pytest.mark.parametrize(
    ("given", "shape", "result"),
    [
        ((2, 1, 4, 6), GREY, (2, 1, 4, 6)),
        ((2, 4, 6), GREY, (2, 1, 4, 6)),
        ((1, 4, 6), GREY, (1, 1, 4, 6)),
        ((4, 6), GREY, (1, 1, 4, 6)),
        ((2, 3, 4, 6), COLOUR, (2, 3, 4, 6)),
        ((3, 4, 6), COLOUR, (1, 3, 4, 6)),
        ((5, 4, 6), None, (5, 1, 4, 6)),
        ((5, 3, 4, 6), None, (5, 3, 4, 6)),
    ],
)
def test_axes_of_a_grey_or_single_image_may_be_left_out(given, shape, result):
    assert check_images(np.zeros(given, np.uint8), "images", shape).shape == result


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_are_returned_as_float32(dtype):
    found = check_images(np.full((4, 6), 0.5, dtype), "images", GREY)
    assert found.dtype == np.float32
    assert (found == 0.5).all()


def test_the_result_is_a_contiguous_copy_that_can_be_written():
    given = np.arange(48, dtype=np.uint8).reshape(2, 1, 4, 6)
    given.flags.writeable = False
    found = check_images(given[::-1], "images", GREY)
    assert found.flags.c_contiguous
    assert found.flags.writeable
    assert (found == given[::-1]).all()


@pytest.mark.parametrize(
    ("images", "shape", "message"),
    [
        (np.zeros((2, 1, 4, 6), np.int64), GREY, r"images: found int64; expected uint8 from 0 to 255, uint16"),
        (np.zeros((2, 1, 4, 6), bool), GREY, r"images: found bool"),
        ([["a"]], None, r"images: found <U1"),
        (np.full((4, 6), 2.0), GREY, r"images: found floats from 2 to 2; expected 0 to 1"),
        (np.full((4, 6), -0.1), GREY, r"images: found floats from -0\.1"),
        (np.full((4, 6), np.nan), GREY, r"images: holds values that are not finite"),
        (np.zeros((2, 1, 8, 8), np.uint8), GREY, r"found images of shape 2 x 1 x 8 x 8; .* C x H x W = 1 x 4 x 6"),
        (np.zeros((2, 4, 6, 3), np.uint8), COLOUR, r"channels are last here: use images\.transpose\(0, 3, 1, 2\)"),
        (np.zeros((2, 4, 6, 1), np.uint8), GREY, r"channels are last here"),
        (np.zeros((2, 2, 4, 6), np.uint8), None, r"found shape 2 x 2 x 4 x 6; expected \(N, C, H, W\)"),
        (np.zeros((2, 4, 6), np.uint8), COLOUR, r"found shape 2 x 4 x 6"),
        (np.zeros((4, 6), np.uint8), None, r"found shape 4 x 6"),
        (np.zeros((0, 1, 4, 6), np.uint8), GREY, r"found shape 0 x 1 x 4 x 6"),
        (np.uint8(3), None, r"images: found shape"),
    ],
)
def test_other_arrays_are_refused(images, shape, message):
    with pytest.raises(UserError, match=message):
        check_images(images, "images", shape)
