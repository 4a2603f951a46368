"""Map intensities to grey values: the low end of a window becomes 0 (black), its high end 65535 (white)."""

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from medgen.config import IntensityWindow

_NUM_SAMPLES = 1 << 21  # values from which percentiles are computed


def apply_window(values: NDArray[Any], window: IntensityWindow) -> NDArray[np.uint16]:
    """Intensities of an image -> grey values of the same shape."""
    samples = sample(values)
    limits = find_limits(samples[np.isfinite(samples)], window)
    if values.dtype in (np.uint8, np.uint16):
        table = stretch(np.arange(int(np.iinfo(values.dtype).max) + 1), *limits)
        return cast(NDArray[np.uint16], table[values])
    return stretch(values, *limits)


def find_limits(samples: NDArray[Any], window: IntensityWindow) -> tuple[float, float]:
    """Intensities that become black and white; `samples` are finite ones of the image or volume."""
    if not window.is_percentile:
        return window.low, window.high
    if not samples.size:
        return 0.0, 0.0
    low, high = np.percentile(samples, [window.low, window.high]).tolist()
    if low == high:  # nearly all values are background, as in a lesion map
        low, high = float(samples.min()), float(samples.max())
    return low, high


def stretch(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint16]:
    """Intensities -> 0 at `low` to 65535 at `high`; black where they are not finite."""
    with np.errstate(all="ignore"):
        shares = (values - low) / (high - low)
        shares = np.where(np.isfinite(values) & (shares > 0), np.minimum(shares, 1.0), 0.0)
    return np.rint(shares * 65535).astype(np.uint16)


def sample(values: NDArray[Any]) -> NDArray[Any]:
    """At most `_NUM_SAMPLES` of the values, the same ones each time, in one dimension.

    Multiples of the golden ratio modulo 1 are evenly distributed and do not align with the sides of the image (Knuth,
    The Art of Computer Programming 3, 6.4).
    """
    flat: NDArray[Any] = values.reshape(-1, order="F" if values.flags.f_contiguous else "C")
    if flat.size <= _NUM_SAMPLES:
        return flat
    places = np.arange(_NUM_SAMPLES, dtype=np.uint64) * np.uint64(2654435769) % np.uint64(1 << 32)
    places = places * np.uint64(flat.size) >> np.uint64(32)
    return cast(NDArray[Any], flat[places])
