"""Stored values of a DICOM frame -> shades of grey, by the transformations of PS3.3 C.11.

grey = render(stored, shades)  # (H, W) uint16

Shapes: H W height and width of a frame, F the stretch of it that is worked on at a time.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 20  # values worked on at a time, so that 64-bit arithmetic takes no memory worth speaking of


@dataclass(frozen=True, slots=True)
class Stored:
    """The values of a frame as they are stored."""

    codes: Any  # (H, W) or (H, W, 3), unsigned, nothing above `bits`; or floats
    bits: int
    signed: bool  # the codes are two's complement
    ycc: bool = False  # colours that are YCbCr

    @property
    def tabular(self) -> bool:
        """There are few enough different values to do the arithmetic once for each."""
        return self.codes.dtype.kind == "u" and self.bits <= 16

    def values(self, codes: Any) -> Any:
        """The numbers that some of the codes stand for."""
        if codes.dtype.kind != "u":
            return codes.astype(np.float64)
        wide = codes.astype(np.int64)
        return np.where(wide >> (self.bits - 1) == 1, wide - (1 << self.bits), wide) if self.signed else wide

    def blocks(self) -> Iterator[slice]:
        """Stretches that cover the flat codes."""
        return (slice(start, start + _BLOCK) for start in range(0, self.codes.size, _BLOCK))

    def look_up(self, function: Callable[[Any], Any]) -> Any:
        """`function` of each value, by a table of all values."""
        table = function(self.values(np.arange(1 << self.bits, dtype=np.uint32)))
        flat = self.codes.reshape(-1)
        out = np.empty((flat.size, *table.shape[1:]), table.dtype)
        for block in self.blocks():
            out[block] = table[flat[block]]
        return out.reshape(*self.codes.shape, *table.shape[1:])


@dataclass(frozen=True, slots=True)
class Table:
    """A lookup table of the file (PS3.3 C.11.1.1): values below or above it are its ends'."""

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
class Shades:
    """The way from a stored value to a shade."""

    slope: float
    intercept: float
    modality: Table | None
    voi: Callable[[Any], Any] | None  # a value -> 0..1; None: the range of the frame
    inverted: bool
    padding: tuple[float, float] | None  # stored values that are no picture

    def measured(self, values: Any) -> Any:
        """Stored values (F) -> what they measure, such as Hounsfield units (F)."""
        return self.modality(values) if self.modality else values * self.slope + self.intercept

    def is_picture(self, values: Any) -> Any:
        """Which stored values (F) are neither padding nor no numbers at all."""
        if self.padding is None:
            return np.isfinite(values)
        return np.isfinite(values) & ((values < self.padding[0]) | (values > self.padding[1]))

    def ends(self, parts: Iterable[Any]) -> tuple[float, float]:
        """The smallest and the largest value measured over parts of a frame, each (F)."""
        low, high = np.inf, -np.inf
        for values in parts:
            measured = self.measured(values[self.is_picture(values)])
            measured = measured[np.isfinite(measured)]
            low = min(low, float(measured.min(initial=np.inf)))
            high = max(high, float(measured.max(initial=-np.inf)))
        return low, high

    def grey(self, values: Any, low: float, high: float) -> NDArray[np.uint16]:
        """Stored values (F) -> 0..65535 (F); `low` and `high` are the frame's ends, used where there is no window."""
        if self.voi is None and not 0 < high - low < np.inf:
            return np.zeros(values.shape, np.uint16)
        picture = self.is_picture(values)
        measured = self.measured(np.where(picture, values, 0))
        share = self.voi(measured) if self.voi else np.clip((measured - low) / (high - low), 0, 1)
        share = np.where(picture & np.isfinite(share), 1 - share if self.inverted else share, 0)
        shades: NDArray[np.uint16] = np.rint(share * 65535).astype(np.uint16)
        return shades


def render(stored: Stored, shades: Shades) -> NDArray[np.uint16]:
    """Stored grey values (H, W) -> (H, W) uint16 that fill the range."""
    flat = stored.codes.reshape(-1)
    with np.errstate(all="ignore"):  # of hostile slopes and floats; what is not finite is no picture
        if stored.tabular:
            present = np.zeros(1 << stored.bits, bool)
            for block in stored.blocks():
                present[flat[block]] = True
            ends = shades.ends([stored.values(np.flatnonzero(present).astype(np.uint32))])
            table: NDArray[np.uint16] = stored.look_up(lambda values: shades.grey(values, *ends))
            return table
        ends = shades.ends(stored.values(flat[block]) for block in stored.blocks())
        grey = np.empty(flat.shape, np.uint16)
        for block in stored.blocks():
            grey[block] = shades.grey(stored.values(flat[block]), *ends)
    return np.reshape(grey, stored.codes.shape)
