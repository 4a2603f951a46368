"""Greyscale transformation of a DICOM frame: modality LUT, VOI LUT or window, inversion and padding (PS3.3 C.11).

grey = apply_voi(stored, transform)  # (H, W) uint16

Shapes: H W height and width of a frame, F a flat block of it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgen.config import IntensityWindow
from medgen.ingest.formats.windowing import find_limits, sample

_BLOCK = 1 << 20  # values per block: bounds the memory of 64-bit arithmetic


@dataclass(frozen=True, slots=True)
class StoredPixels:
    """Pixel values of a frame as they are stored."""

    codes: Any  # (H, W) or (H, W, 3): unsigned integers of `bits` bits, or floats
    bits: int
    is_signed: bool  # the codes are two's complement
    is_ycc: bool = False  # the colours are YCbCr

    @property
    def fits_table(self) -> bool:
        """True if a table of all possible values is small."""
        return self.codes.dtype.kind == "u" and self.bits <= 16

    def to_values(self, codes: Any) -> Any:
        """Codes (F) -> signed or unsigned values (F)."""
        if codes.dtype.kind != "u":
            return codes.astype(np.float64)
        wide = codes.astype(np.int64)
        return np.where(wide >> (self.bits - 1) == 1, wide - (1 << self.bits), wide) if self.is_signed else wide

    def blocks(self) -> Iterator[slice]:
        """Slices that cover the flat codes."""
        return (slice(start, start + _BLOCK) for start in range(0, self.codes.size, _BLOCK))

    def map_values(self, function: Callable[[Any], Any]) -> Any:
        """Apply `function` to each value, through a table of all values."""
        table = function(self.to_values(np.arange(1 << self.bits, dtype=np.uint32)))
        flat = self.codes.reshape(-1)
        out = np.empty((flat.size, *table.shape[1:]), table.dtype)
        for block in self.blocks():
            out[block] = table[flat[block]]
        return out.reshape(*self.codes.shape, *table.shape[1:])


@dataclass(frozen=True, slots=True)
class LookupTable:
    """A lookup table of the file (PS3.3 C.11.1.1); values outside its range map to its first or last entry."""

    first: int
    entries: NDArray[np.float64]

    def __call__(self, values: Any) -> Any:
        """Values (F) -> entries (F)."""
        return self.entries[np.clip(np.rint(values) - self.first, 0, len(self.entries) - 1).astype(np.int64)]


@dataclass(frozen=True, slots=True)
class Window:
    """A window of the file (PS3.3 C.11.2.1.2, C.11.2.1.3)."""

    centre: float
    width: float
    function: str

    def __call__(self, values: Any) -> Any:
        """Values (F) -> 0..1 (F)."""
        if self.function == "SIGMOID":
            return 1 / (1 + np.exp(-4 * (values - self.centre) / self.width))
        exact = self.function == "LINEAR_EXACT"
        centre, width = (self.centre, self.width) if exact else (self.centre - 0.5, self.width - 1)
        if width == 0:
            return (values > centre).astype(np.float64)
        return np.clip((values - centre) / width + 0.5, 0, 1)


@dataclass(frozen=True, slots=True)
class VoiTransform:
    """Transformation of stored values to grey values."""

    slope: float
    intercept: float
    modality_lut: LookupTable | None  # replaces slope and intercept
    voi: LookupTable | Window | None  # modality value -> 0..1; None: `window`
    window: IntensityWindow | None  # of modality values; None: the frame's own range
    is_inverted: bool
    padding: tuple[float, float] | None  # smallest and largest stored value that is padding

    def to_modality(self, values: Any) -> Any:
        """Stored values (F) -> modality values such as Hounsfield units (F)."""
        return self.modality_lut(values) if self.modality_lut else values * self.slope + self.intercept

    def is_valid(self, values: Any) -> Any:
        """Stored values (F) -> True where they are finite and not padding (F)."""
        if self.padding is None:
            return np.isfinite(values)
        return np.isfinite(values) & ((values < self.padding[0]) | (values > self.padding[1]))

    def find_range(self, blocks: Iterable[Any]) -> tuple[float, float]:
        """Smallest and largest modality value in blocks of stored values, each (F)."""
        low, high = np.inf, -np.inf
        for values in blocks:
            modality = self.to_modality(values[self.is_valid(values)])
            modality = modality[np.isfinite(modality)]
            low = min(low, float(modality.min(initial=np.inf)))
            high = max(high, float(modality.max(initial=-np.inf)))
        return low, high

    def to_grey(self, values: Any, low: float, high: float) -> NDArray[np.uint16]:
        """Stored values (F) -> 0..65535 (F); `low` and `high` become black and white if there is no VOI transform."""
        if self.voi is None and not 0 < high - low < np.inf:
            return np.zeros(values.shape, np.uint16)
        valid = self.is_valid(values)
        modality = self.to_modality(np.where(valid, values, 0))
        share = self.voi(modality) if self.voi else np.clip((modality - low) / (high - low), 0, 1)
        share = np.where(valid & np.isfinite(share), 1 - share if self.is_inverted else share, 0)
        grey: NDArray[np.uint16] = np.rint(share * 65535).astype(np.uint16)
        return grey


def apply_voi(stored: StoredPixels, transform: VoiTransform) -> NDArray[np.uint16]:
    """Stored grey values (H, W) -> (H, W) uint16; black is 0 and white is 65535."""
    flat = stored.codes.reshape(-1)
    with np.errstate(all="ignore"):  # damaged slopes and floats overflow; results that are not finite become black
        limits = _find_limits(stored, flat, transform)
        if stored.fits_table:
            table: NDArray[np.uint16] = stored.map_values(lambda values: transform.to_grey(values, *limits))
            return table
        grey = np.empty(flat.shape, np.uint16)
        for block in stored.blocks():
            grey[block] = transform.to_grey(stored.to_values(flat[block]), *limits)
    return np.reshape(grey, stored.codes.shape)


def to_intensities(stored: StoredPixels, transform: VoiTransform) -> NDArray[np.float32]:
    """Stored grey values (H, W) -> modality values such as Hounsfield units (H, W), NaN where they are padding."""
    flat = stored.codes.reshape(-1)
    values = np.empty(flat.shape, np.float32)
    with np.errstate(all="ignore"):
        for block in stored.blocks():
            block_values = stored.to_values(flat[block])
            valid = transform.is_valid(block_values)
            values[block] = np.where(valid, transform.to_modality(np.where(valid, block_values, 0)), np.nan)
    return values.reshape(stored.codes.shape)


def _find_limits(stored: StoredPixels, flat: Any, transform: VoiTransform) -> tuple[float, float]:
    """Modality values that become black and white where there is no VOI LUT and no window of the file."""
    if transform.window is not None:
        values = stored.to_values(sample(flat))
        modality = transform.to_modality(values[transform.is_valid(values)])
        return find_limits(modality[np.isfinite(modality)], transform.window)
    if not stored.fits_table:
        return transform.find_range(stored.to_values(flat[block]) for block in stored.blocks())
    present = np.zeros(1 << stored.bits, bool)
    for block in stored.blocks():
        present[flat[block]] = True
    return transform.find_range([stored.to_values(np.flatnonzero(present).astype(np.uint32))])
