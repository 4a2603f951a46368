"""Check image arrays that come from a user's Python code.

Shapes: N images, C channels (1 grey, 3 colour), H W height and width, D depth of volumes.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgen.errors import UserError

DTYPES = (np.uint8, np.uint16, np.float16, np.float32, np.float64)
EXPECTED = "uint8 from 0 to 255, uint16 from 0 to 65535, or floats from 0 to 1"


def check_images(
    images: Any, name: str, shape: tuple[int, ...] | None = None
) -> NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.float32]:
    """Images as a new array (N, C, H, W): uint8 from 0 to 255, uint16 from 0 to 65535, or float32 from 0 to 1.

    Grey images may leave out C; where the shape is known, a single image may leave out N.

    Args:
        images: uint8 from 0 to 255, uint16 from 0 to 65535, or floats from 0 to 1.
        name: the argument's name, for error messages.
        shape: the expected C, H, W, or C, D, H, W of volumes; None accepts grey and colour images of any size.

    Raises:
        UserError: the shape, type or range is another one, a value is not finite, or there is no image.
    """
    array = np.asarray(images)
    if array.dtype not in DTYPES:
        raise UserError(f"{name}: found {array.dtype}; expected {EXPECTED}")
    array = _add_axes(array, shape)
    found = " x ".join(map(str, np.shape(images)))
    axes = "C, D, H, W" if shape is not None and len(shape) == 4 else "C, H, W"
    num_axes = 1 + len(axes.split(", "))
    if array.ndim != num_axes or array.shape[1] not in (1, 3) or not array.size:
        hint = ""
        if array.ndim == num_axes and array.shape[-1] in (1, 3):
            order = ", ".join(map(str, (0, num_axes - 1, *range(1, num_axes - 1))))
            hint = f"; the channels are last here: use images.transpose({order})"
        raise UserError(f"{name}: found shape {found}; expected (N, {axes}) with 1 or 3 channels{hint}")
    if shape is not None and array.shape[1:] != shape:
        expected = " x ".join(map(str, shape))
        raise UserError(
            f"{name}: found images of shape {found}; expected (N, {axes}) with {axes.replace(', ', ' x ')} = {expected}"
        )
    if array.dtype.kind == "u":
        return np.array(array, order="C")
    if not np.isfinite(array).all():
        raise UserError(f"{name}: holds values that are not finite (NaN or infinity); expected floats from 0 to 1")
    low, high = float(array.min()), float(array.max())
    if low < 0.0 or high > 1.0:
        raise UserError(
            f"{name}: found floats from {low:g} to {high:g}; expected 0 to 1. Scale them, or pass uint8 from 0 to 255"
        )
    return np.array(array, np.float32, order="C")


def _add_axes(array: NDArray[Any], shape: tuple[int, ...] | None) -> NDArray[Any]:
    """`array` with the axes N and C if it leaves them out."""
    num_axes = 3 if shape is None else len(shape)  # without N
    if array.ndim == num_axes and array.shape == shape:
        return array[None]
    if array.ndim == num_axes and (shape is None or shape[0] == 1):
        return array[:, None]
    if array.ndim == num_axes - 1 and shape is not None and shape[0] == 1:
        return array[None, None]
    return array
