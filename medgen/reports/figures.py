"""Write figures: image grids, originals over reconstructions, curves, animations.

The same input gives the same bytes, without dates, versions or random colours, so that figures can be compared and
cached by hash. Files are written atomically.
"""

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from medgen.data.images import middle_planes, side_by_side, to_floats
from medgen.io import replace_folder, write_atomic
from medgen.reports import fonts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pixels = npt.NDArray[np.uint8]
# (N, 1 or 3, H, W), floats in [0, 1], uint8 or uint16; volumes (N, 1, D, H, W) are drawn as their middle planes
Images = Tensor | npt.NDArray[Any]

_GAP = 2  # pixels between tiles
_CAPTION_HEIGHT = 18
_BACKGROUND = (255, 255, 255)
_TEXT = (40, 40, 40)
_MIN_TILE = 96  # smaller images are enlarged by an integer factor to at least this side
MAX_DIFFERENCE = 0.25  # of grey values in [0, 1] that a difference map distinguishes
NUM_COLOURS = 7  # of _STYLE
_PALETTE_FRAMES = 64  # at most, from which the palette of an animation is computed
_STYLE: dict[Any, Any] = {  # added to matplotlib's defaults; the user's settings are ignored
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    # Okabe and Ito's colours, which colour-blind readers can distinguish
    "axes.prop_cycle": "cycler('color', ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000'])",
}


def write_image(path: Path, image: Tensor) -> None:
    """Write one image (1 or 3, H, W) as PNG: uint16 in 16 bits, uint8 or floats in [0, 1] in 8 bits.

    Of a volume (1, D, H, W) the three middle planes are written side by side.
    """
    image = flatten(image[None])[0]
    if image.is_floating_point():
        image = (image.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    pixels = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
    if pixels.dtype == np.uint8:
        _save(path, Image.fromarray(pixels), "PNG")
    else:
        write_atomic(path, encode_deep(".png", pixels))


def encode_deep(suffix: str, pixels: npt.NDArray[Any]) -> bytes:
    """Content of a .png file of uint16 or a .tif file of any type, from grey (H, W) or RGB (H, W, 3).

    Pillow writes no RGB of more than 8 bits.
    """
    import cv2

    bgr = pixels if pixels.ndim == 2 else cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2BGR)
    content: bytes = cv2.imencode(suffix, bgr)[1].tobytes()
    return content


def write_images(folder: Path, images: Iterable[Tensor]) -> None:
    """Write images (1 or 3, H, W) as 00000.png and so on, in a folder that replaces an earlier one."""
    with replace_folder(folder) as building:
        for number, image in enumerate(images):
            write_image(building / f"{number:05d}.png", image)


def write_grid(
    path: Path,
    images: Images,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    scale: int | None = None,
) -> None:
    """Write images as one PNG, row by row, each with a caption of one line below it; by default about square.

    Pixels are repeated `scale` times; by default an image gets at least 96 pixels a side.

    Raises:
        ValueError: there is no image, the number of channels is wrong, or the number of captions differs.
    """
    tiles = _tiles(images, scale)
    _check_captions(captions, len(tiles))
    columns = min(len(tiles), columns or math.ceil(math.sqrt(len(tiles))))
    height, width = tiles.shape[1:3]
    pitch = height + _GAP + (_CAPTION_HEIGHT if captions else 0)
    canvas = Image.new(
        "RGB", (columns * (width + _GAP) + _GAP, math.ceil(len(tiles) / columns) * pitch + _GAP), _BACKGROUND
    )
    draw = ImageDraw.Draw(canvas)
    for position, tile in enumerate(tiles):
        row, column = divmod(position, columns)
        left, top = _GAP + column * (width + _GAP), _GAP + row * pitch
        canvas.paste(Image.fromarray(tile), (left, top))
        if captions:
            _draw_caption(draw, (left + width // 2, top + height + _CAPTION_HEIGHT // 2), captions[position], width)
    _write_png(path, canvas)


def write_stacks(
    path: Path, lines: Mapping[str, Images], columns: int = 8, captions: Sequence[str] | None = None
) -> None:
    """Write stacks of corresponding images, `columns` stacks side by side, as one PNG.

    `lines` has the images of each level by name, from the top; `captions`, below the stacks, have equally many lines.

    Raises:
        ValueError: the shapes of the lines or the number of captions differ.
    """
    tiled = {name: _tiles(images, None) for name, images in lines.items()}
    first = next(iter(tiled.values()))
    for name, tiles in tiled.items():
        if tiles.shape != first.shape:
            raise ValueError(f"{name}s: expected shape {first.shape}, found {tiles.shape}")
    _check_captions(captions, len(first))
    texts = [caption.split("\n") for caption in captions or ()]
    num_rows = math.ceil(len(first) / columns)
    columns = math.ceil(len(first) / num_rows)  # rows of about equal length
    height, width = first.shape[1:3]
    margin = _CAPTION_HEIGHT + _GAP
    stack_height = len(tiled) * (height + _GAP)
    pitch = stack_height + (len(texts[0]) if texts else 0) * _CAPTION_HEIGHT + 3 * _GAP  # with a gap between rows
    canvas = Image.new("RGB", (margin + columns * (width + _GAP), num_rows * pitch - 2 * _GAP), _BACKGROUND)
    for row in range(num_rows):
        for line, (name, tiles) in enumerate(tiled.items()):
            top = _GAP + row * pitch + line * (height + _GAP)
            canvas.paste(_vertical_caption(name, height), (0, top))
            for column, tile in enumerate(tiles[row * columns : (row + 1) * columns]):
                canvas.paste(Image.fromarray(tile), (margin + column * (width + _GAP), top))
    draw = ImageDraw.Draw(canvas)
    for position, text in enumerate(texts):
        row, column = divmod(position, columns)
        centre = margin + column * (width + _GAP) + width // 2
        for line, words in enumerate(text):
            middle = _GAP + row * pitch + stack_height + line * _CAPTION_HEIGHT + _CAPTION_HEIGHT // 2
            _draw_caption(draw, (centre, middle), words, width)
    _write_png(path, canvas)


def overlay(images: Tensor, true: Tensor, predicted: Tensor) -> Tensor:
    """Images (N, C, H, W) as stored tinted by masks of class indices (N, H, W), as floats (N, 3, H, W) in [0, 1].

    Of volumes and their masks the middle planes are tinted.

    Blue: the prediction is a correct class other than 0; red: it misses such a class; yellow: false positive.
    """
    images = flatten(images)
    true, predicted = (flatten(masks[:, None])[:, 0] for masks in (true, predicted))
    result = to_floats(images).expand(-1, 3, -1, -1)
    for pixels, colour in (
        ((true > 0) & (predicted == true), (0, 114, 178)),
        ((true > 0) & (predicted != true), (213, 94, 0)),
        ((true == 0) & (predicted > 0), (240, 228, 66)),
    ):
        tinted = 0.55 * result + 0.45 * torch.tensor(colour)[:, None, None] / 255.0
        result = torch.where(pixels[:, None], tinted, result)
    return result


def to_colours(images: Tensor) -> Tensor:
    """Images (N, 1 or 3, H, W) as (N, 3, H, W); volumes as their middle planes."""
    return flatten(images).expand(-1, 3, -1, -1)


def differences(images: Tensor, others: Tensor) -> Tensor:
    """Colours (N, 3, H, W) of `others` minus `images`, both (N, C, H, W) in [0, 1], in [0, 1].

    White: equal; blue: darker; red: brighter; full colour at a difference of MAX_DIFFERENCE, mean over the channels.
    """
    images, others = flatten(images), flatten(others)
    difference = ((others - images).mean(dim=1, keepdim=True) / MAX_DIFFERENCE).clamp(-1.0, 1.0)
    blue, red = (torch.tensor(colour)[:, None, None] / 255.0 for colour in ((0, 114, 178), (213, 94, 0)))
    size = difference.abs()
    return (1.0 - size) + size * torch.where(difference < 0, blue, red)


def heat(values: Tensor, most: float = MAX_DIFFERENCE) -> Tensor:
    """Colours (N, 3, H, W) in [0, 1] of values (N, 1, H, W): from black at 0 over red and yellow to white at `most`."""
    share = 3.0 * (flatten(values) / max(most, 1e-12)).clamp(0.0, 1.0)
    return torch.cat([(share - start).clamp(0.0, 1.0) for start in (0.0, 1.0, 2.0)], dim=1)


def write_curves(
    path: Path,
    series: Mapping[str, Sequence[float]],
    log: bool = False,
    *,
    y_label: str = "value",
    phases: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Plot named series over epochs, counted from 1, as one PNG; NaN leaves a gap.

    `log` adds a second plot with a logarithmic axis, with gaps at values <= 0. `phases` has the first epoch of each
    phase by name, in order; with two or more, a line marks where each begins.

    Raises:
        ValueError: there is no series.
    """
    if not series:
        raise ValueError("series: found none, expected at least one")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with plot_style(phases):
        scales = ("linear", "log") if log else ("linear",)
        figure = Figure(figsize=(5.2 * len(scales), 3.6), dpi=110, layout="constrained")
        for axes, scale in zip(figure.subplots(1, len(scales), squeeze=False)[0], scales, strict=True):
            for name, values in series.items():
                heights = np.asarray(values, dtype=np.float64)
                heights = np.where((heights > 0) | (scale == "linear"), heights, np.nan)
                marker = "o" if len(heights) == 1 else None  # a single point has no line
                axes.plot(np.arange(1, len(heights) + 1), heights, label=name, marker=marker)
            axes.set(xlabel="epoch", ylabel=f"{y_label} ({scale})" if log else y_label, yscale=scale)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            if len(phases) > 1:
                for name, first in phases.items():
                    axes.axvline(first - 0.5, color="#888888", linewidth=1.0, linestyle=":")
                    where = axes.get_xaxis_transform()  # epochs, and shares of the plot's height
                    text = fonts.caption(name).text
                    axes.text(first - 0.4, 1.01, text, transform=where, fontsize=8.0, color="#555555")
            axes.legend()
        write_plot(path, figure)


def write_scatter(
    path: Path,
    groups: Mapping[str, npt.NDArray[np.float64]],
    background: Mapping[str, npt.NDArray[np.float64]],
    labels: tuple[str, str],
) -> None:
    """Plot groups of points (N, 2), each in a colour of its own, over grey background points, as one PNG."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    with plot_style(groups):
        figure = Figure(figsize=(6.4, 5.2), dpi=110, layout="constrained")
        axes = figure.subplots()
        for name, points in background.items():
            axes.scatter(points[:, 0], points[:, 1], s=24, color="#8a8a8a", marker="+", linewidths=0.8, label=name)
        for number, (name, points) in enumerate(groups.items()):
            colour = f"C{number}" if len(groups) <= NUM_COLOURS else colormaps["turbo"](number / (len(groups) - 1))
            axes.scatter(points[:, 0], points[:, 1], s=14, color=colour, linewidths=0, alpha=0.8, label=name)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        if len(groups) <= 2 * NUM_COLOURS:  # a longer list does not fit
            axes.legend(fontsize=8.0, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        write_plot(path, figure)


def write_intervals(
    path: Path, series: Mapping[str, Mapping[float, tuple[float, float, float]]], labels: tuple[str, str]
) -> None:
    """Plot series of values with their intervals, x to (value, low, high), over a logarithmic x axis, as one PNG."""
    from matplotlib.figure import Figure

    with plot_style(series):
        figure = Figure(figsize=(6.4, 4.2), dpi=110, layout="constrained")
        axes = figure.subplots()
        for number, (name, points) in enumerate(series.items()):
            values, lows, highs = (np.array(each) for each in zip(*points.values(), strict=True))
            places = np.array(list(points)) * (1.0 + 0.03 * number)  # side by side where x is the same
            axes.errorbar(places, values, (values - lows, highs - values), marker="o", capsize=3, label=name)
        axes.set(xlabel=labels[0], ylabel=labels[1], xscale="log")
        ticks = sorted({x for points in series.values() for x in points})
        axes.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
        axes.minorticks_off()
        axes.legend()
        write_plot(path, figure)


@contextmanager
def plot_style(texts: Iterable[str] = ()) -> Iterator[None]:
    """Context manager in which plots have medgen's style, whatever the user's settings are, and can show `texts`."""
    import matplotlib as mpl  # slow to import, and most callers never plot

    style = {**_STYLE, "font.family": fonts.families(text for text in texts if not text.isascii())}
    with mpl.rc_context({**mpl.rcParamsDefault, **style, "backend": "agg"}):
        yield


def write_plot(path: Path, figure: "Figure") -> None:
    """Write a matplotlib figure as PNG, without matplotlib's version in its metadata."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def write_gif(path: Path, frames: Sequence[Path], seconds_per_frame: float = 0.5) -> None:
    """Write image files of one size as an endless animation whose last frame is shown four times as long.

    Raises:
        ValueError: there is no frame, or frames differ in size.
    """
    if not frames:
        raise ValueError("frames: found none, expected at least one image")
    images = []
    for frame in frames:
        with Image.open(frame) as image:
            images.append(image.convert("RGB"))
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise ValueError(f"frames: expected one size, found {sorted(sizes)}")
    # One palette for all frames; with a palette for each, static areas would flicker.
    num_shown = min(_PALETTE_FRAMES, len(images))
    shown = [images[i * len(images) // num_shown] for i in range(num_shown)]
    width, height = shown[0].size
    sheet = Image.new("RGB", (width, height * num_shown))
    for number in range(num_shown):
        sheet.paste(shown[number], (0, height * number))
    palette = sheet.quantize(256, method=Image.Quantize.MEDIANCUT)
    indexed = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    milliseconds = 10 * max(1, round(100 * seconds_per_frame))
    durations = [milliseconds] * (len(indexed) - 1) + [4 * milliseconds]
    _save(path, indexed[0], "GIF", save_all=True, append_images=indexed[1:], duration=durations, loop=0)


def flatten(images: Tensor) -> Tensor:
    """Images (N, C, H, W) unchanged, volumes (N, C, D, H, W) as their middle planes side by side (N, C, S, 3·S)."""
    return images if images.dim() == 4 else side_by_side(middle_planes(images), images.shape[1])


def _tiles(images: Images, scale: int | None) -> Pixels:
    """RGB tiles (N, H * scale, W * scale, 3) of images (N, C, H, W)."""
    if isinstance(images, Tensor):
        images = flatten(images.detach().cpu())
        images = (images.float() if images.is_floating_point() else images).numpy()  # NumPy has no bfloat16
    array = np.asarray(images)
    if array.dtype == np.uint16:
        array = array / np.float32(np.iinfo(array.dtype).max)
    if array.ndim != 4 or len(array) == 0 or array.shape[1] not in (1, 3):
        raise ValueError(f"images: expected (N, 1 or 3, H, W) with N > 0, found shape {array.shape}")
    if array.dtype != np.uint8:
        array = np.rint(np.clip(np.nan_to_num(array), 0.0, 1.0) * 255.0).astype(np.uint8)  # NaN is drawn black
    scale = scale or max(1, math.ceil(_MIN_TILE / min(array.shape[2:])))
    array = array.repeat(scale, axis=2).repeat(scale, axis=3)
    return np.ascontiguousarray(np.broadcast_to(array.transpose(0, 2, 3, 1), (*array.shape[:1], *array.shape[2:], 3)))


def _check_captions(captions: Sequence[str] | None, expected: int) -> None:
    if captions is not None and len(captions) != expected:
        raise ValueError(f"captions: found {len(captions)}, expected {expected}")


def _draw_caption(draw: ImageDraw.ImageDraw, centre: tuple[int, int], text: str, width: int) -> None:
    """Draw a line of text, cut with an ellipsis if it is wider than `width` pixels."""
    text, font = fonts.caption(text)
    if draw.textlength(text, font) > width:
        while text and draw.textlength(text + "…", font) > width:
            text = text[:-1]
        text += "…"
    draw.text(centre, text, _TEXT, font, anchor="mm")


def _vertical_caption(text: str, height: int) -> Image.Image:
    """A strip of `_CAPTION_HEIGHT` by `height` pixels with the text from bottom to top."""
    strip = Image.new("RGB", (height, _CAPTION_HEIGHT), _BACKGROUND)
    _draw_caption(ImageDraw.Draw(strip), (height // 2, _CAPTION_HEIGHT // 2), text, height)
    return strip.transpose(Image.Transpose.ROTATE_90)


def _write_png(path: Path, canvas: Image.Image) -> None:
    pixels = np.asarray(canvas)
    if (pixels[..., :1] == pixels).all():
        canvas = canvas.convert("L")  # a third of the bytes
    _save(path, canvas, "PNG")


def _save(path: Path, image: Image.Image, kind: str, **options: Any) -> None:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    write_atomic(path, buffer.getvalue())
