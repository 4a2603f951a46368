"""Write figures: image grids, originals over reconstructions, curves, animations.

The same input gives the same bytes, without dates, versions or random colours, so that figures can be compared and
cached by hash. Files are written atomically.
"""

import io
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from medgen.io import swap, write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pixels = npt.NDArray[np.uint8]

_GAP = 2  # pixels between tiles
_FONT_SIZE = 12
_CAPTION_HEIGHT = 18
_BACKGROUND = (255, 255, 255)
_TEXT = (40, 40, 40)
_MIN_TILE = 96  # smaller images are enlarged by an integer factor to at least this side
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
    """Write one image (1 or 3, H, W), uint8 or floats in [0, 1], as PNG."""
    if image.is_floating_point():
        image = (image.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    array = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def write_images(folder: Path, images: Tensor) -> None:
    """Write images (N, 1 or 3, H, W) as 00000.png and so on, in a folder that replaces an earlier one."""
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    for number, image in enumerate(images):
        write_image(building / f"{number:05d}.png", image)
    swap(building, folder)


def write_grid(
    path: Path,
    images: Tensor | npt.NDArray[Any],
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    scale: int | None = None,
) -> None:
    """Write images as one PNG, row by row.

    Args:
        path: the PNG; its folder is created.
        images: (N, C, H, W) with one or three channels, floats in [0, 1] or uint8.
        columns: images per row; by default the grid is about square.
        captions: one line under each image.
        scale: integer factor of enlargement by pixel repetition; by default a tile has at least 96 pixels.

    Raises:
        ValueError: there is no image, the number of channels is wrong, or the number of captions differs.
    """
    tiles = _tiles(images, scale)
    if captions is not None and len(captions) != len(tiles):
        raise ValueError(f"captions: found {len(captions)} for {len(tiles)} images")
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
            text = _shorten(draw, captions[position], width)
            draw.text((left + width // 2, top + height + _CAPTION_HEIGHT // 2), text, _TEXT, _font(), anchor="mm")
    _write_png(path, canvas)


def write_pairs(
    path: Path,
    originals: Tensor | npt.NDArray[Any],
    reconstructions: Tensor | npt.NDArray[Any],
    columns: int = 8,
    scale: int | None = None,
) -> None:
    """Write each original over its reconstruction, `columns` pairs side by side, as one PNG.

    Args:
        path: the PNG; its folder is created.
        originals: (N, C, H, W), as in `write_grid`.
        reconstructions: of the same shape.
        columns: pairs per row.
        scale: integer factor of enlargement, as in `write_grid`.

    Raises:
        ValueError: the shapes differ.
    """
    write_stacks(path, {"original": originals, "reconstruction": reconstructions}, columns, scale)


def write_stacks(
    path: Path,
    lines: Mapping[str, Tensor | npt.NDArray[Any]],
    columns: int = 8,
    scale: int | None = None,
    captions: Sequence[str] | None = None,
) -> None:
    """Write stacks of corresponding images, `columns` stacks side by side, as one PNG.

    Args:
        path: the PNG; its folder is created.
        lines: name -> images (N, C, H, W), as in `write_grid`, from the top to the bottom of the stacks.
        columns: stacks per row.
        scale: integer factor of enlargement, as in `write_grid`.
        captions: text under each stack, all with the same number of lines.

    Raises:
        ValueError: the shapes of the lines or the number of captions differ.
    """
    tiled = {name: _tiles(images, scale) for name, images in lines.items()}
    first = next(iter(tiled.values()))
    for name, tiles in tiled.items():
        if tiles.shape != first.shape:
            raise ValueError(f"{name}s: expected shape {first.shape}, found {tiles.shape}")
    if captions is not None and len(captions) != len(first):
        raise ValueError(f"captions: found {len(captions)} for {len(first)} stacks")
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
            draw.text((centre, middle), _shorten(draw, words, width), _TEXT, _font(), anchor="mm")
    _write_png(path, canvas)


def overlay(images: Tensor, true: Tensor, predicted: Tensor) -> Tensor:
    """Images (N, C, H, W) uint8 tinted by masks of class indices (N, H, W), as floats (N, 3, H, W) in [0, 1].

    Blue: the prediction is a correct class other than 0; red: it misses such a class; yellow: false positive.
    """
    result = images.float().expand(-1, 3, -1, -1) / 255.0
    for pixels, colour in (
        ((true > 0) & (predicted == true), (0, 114, 178)),
        ((true > 0) & (predicted != true), (213, 94, 0)),
        ((true == 0) & (predicted > 0), (240, 228, 66)),
    ):
        tinted = 0.55 * result + 0.45 * torch.tensor(colour)[:, None, None] / 255.0
        result = torch.where(pixels[:, None], tinted, result)
    return result


def write_curves(
    path: Path,
    series: Mapping[str, Sequence[float]],
    log: bool = False,
    *,
    x_label: str = "epoch",
    y_label: str = "value",
) -> None:
    """Plot named series over their positions, counted from 1, as one PNG.

    Args:
        path: the PNG; its folder is created.
        series: name -> values; NaN leaves a gap.
        log: adds a second plot with a logarithmic axis, with gaps at values <= 0.
        x_label: label of the positions.
        y_label: label of the values, with their unit if they have one.

    Raises:
        ValueError: there is no series.
    """
    if not series:
        raise ValueError("series: found none, expected at least one")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with plot_style():
        scales = ("linear", "log") if log else ("linear",)
        figure = Figure(figsize=(5.2 * len(scales), 3.6), dpi=110, layout="constrained")
        for axes, scale in zip(figure.subplots(1, len(scales), squeeze=False)[0], scales, strict=True):
            for name, values in series.items():
                heights = np.asarray(values, dtype=np.float64)
                heights = np.where((heights > 0) | (scale == "linear"), heights, np.nan)
                marker = "o" if len(heights) == 1 else None  # a single point has no line
                axes.plot(np.arange(1, len(heights) + 1), heights, label=name, marker=marker)
            axes.set(xlabel=x_label, ylabel=f"{y_label} ({scale})" if log else y_label, yscale=scale)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.legend()
        write_plot(path, figure)


@contextmanager
def plot_style() -> Iterator[None]:
    """Context manager in which plots have medgen's style, whatever the user's settings are."""
    import matplotlib as mpl  # slow to import, and most callers never plot

    with mpl.rc_context({**mpl.rcParamsDefault, **_STYLE, "backend": "agg"}):
        yield


def write_plot(path: Path, figure: "Figure") -> None:
    """Write a matplotlib figure as PNG, without matplotlib's version in its metadata."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def write_gif(path: Path, frames: Sequence[Path], seconds_per_frame: float = 0.5) -> None:
    """Write image files of one size as an endless animation whose last frame is shown four times as long.

    Args:
        path: the GIF; its folder is created.
        frames: image files, in order.
        seconds_per_frame: duration of each frame, in steps of 0.01 s.

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
    buffer = io.BytesIO()
    indexed[0].save(buffer, "GIF", save_all=True, append_images=indexed[1:], duration=durations, loop=0)
    write_atomic(path, buffer.getvalue())


def _tiles(images: Tensor | npt.NDArray[Any], scale: int | None) -> Pixels:
    """RGB tiles (N, H * scale, W * scale, 3) of images (N, C, H, W)."""
    if isinstance(images, Tensor):
        images = images.detach().cpu()
        images = (images.float() if images.is_floating_point() else images).numpy()  # NumPy has no bfloat16
    array = np.asarray(images)
    if array.ndim != 4 or len(array) == 0 or array.shape[1] not in (1, 3):
        raise ValueError(f"images: expected (N, 1 or 3, H, W) with N > 0, found shape {array.shape}")
    if array.dtype != np.uint8:
        array = np.rint(np.clip(np.nan_to_num(array), 0.0, 1.0) * 255.0).astype(np.uint8)  # NaN is drawn black
    scale = scale or max(1, math.ceil(_MIN_TILE / min(array.shape[2:])))
    array = array.repeat(scale, axis=2).repeat(scale, axis=3)
    return np.ascontiguousarray(np.broadcast_to(array.transpose(0, 2, 3, 1), (*array.shape[:1], *array.shape[2:], 3)))


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_FONT_SIZE)  # part of Pillow, so it is the same on every machine


def _shorten(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """The text, cut with an ellipsis if it is wider than `width` pixels."""
    if draw.textlength(text, _font()) <= width:
        return text
    while text and draw.textlength(text + "…", _font()) > width:
        text = text[:-1]
    return text + "…"


def _vertical_caption(text: str, height: int) -> Image.Image:
    """A strip of `_CAPTION_HEIGHT` by `height` pixels with the text from bottom to top."""
    strip = Image.new("RGB", (height, _CAPTION_HEIGHT), _BACKGROUND)
    draw = ImageDraw.Draw(strip)
    draw.text((height // 2, _CAPTION_HEIGHT // 2), _shorten(draw, text, height), _TEXT, _font(), anchor="mm")
    return strip.transpose(Image.Transpose.ROTATE_90)


def _write_png(path: Path, canvas: Image.Image) -> None:
    pixels = np.asarray(canvas)
    if (pixels[..., :1] == pixels).all():
        canvas = canvas.convert("L")  # a third of the bytes
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())
