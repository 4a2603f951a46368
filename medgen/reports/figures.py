"""Pictures for people: image grids, original-over-reconstruction pairs, curves, animations.

Same input, same bytes: no dates, versions or random colours go into a file, so that figures can be
compared and cached by hash. Files appear whole or not at all.
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
_PAPER = (255, 255, 255)
_INK = (40, 40, 40)
_MIN_TILE = 96  # smaller images are enlarged by a whole factor until they are this large
_PALETTE_FRAMES = 64  # of a film, at most, that its colours are taken from
_STYLE: dict[Any, Any] = {  # over matplotlib's defaults, whatever the user's own are
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    # Okabe and Ito's colours: told apart by colour-blind readers too.
    "axes.prop_cycle": "cycler('color', ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000'])",
}


def write_image(path: Path, image: Tensor) -> None:
    """Writes one image (1 or 3, H, W), uint8 or floats in [0, 1], as PNG, pixel by pixel."""
    if image.is_floating_point():
        image = (image.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    array = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def write_images(folder: Path, images: Tensor) -> None:
    """Writes images (N, 1 or 3, H, W) as 00000.png and on; the folder takes the place of an earlier one."""
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
    """Writes images as one PNG, row after row.

    Args:
        path: the PNG; its folder is made.
        images: (N, C, H, W) with one or three channels, floats in [0, 1] or uint8.
        columns: images per row; the default makes the grid about square.
        captions: one line under each image.
        scale: whole factor of enlargement, pixels repeated, so that nothing is smoothed away;
            the default brings a tile to at least 96 pixels.

    Raises:
        ValueError: no image, an odd number of channels, or captions that do not match.
    """
    tiles = _tiles(images, scale)
    if captions is not None and len(captions) != len(tiles):
        raise ValueError(f"captions: found {len(captions)} for {len(tiles)} images")
    columns = min(len(tiles), columns or math.ceil(math.sqrt(len(tiles))))
    height, width = tiles.shape[1:3]
    pitch = height + _GAP + (_CAPTION_HEIGHT if captions else 0)
    canvas = Image.new("RGB", (columns * (width + _GAP) + _GAP, math.ceil(len(tiles) / columns) * pitch + _GAP), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for position, tile in enumerate(tiles):
        row, column = divmod(position, columns)
        left, top = _GAP + column * (width + _GAP), _GAP + row * pitch
        canvas.paste(Image.fromarray(tile), (left, top))
        if captions:
            text = _shorten(draw, captions[position], width)
            draw.text((left + width // 2, top + height + _CAPTION_HEIGHT // 2), text, _INK, _font(), anchor="mm")
    _write_png(path, canvas)


def write_pairs(
    path: Path,
    originals: Tensor | npt.NDArray[Any],
    reconstructions: Tensor | npt.NDArray[Any],
    columns: int = 8,
    scale: int | None = None,
) -> None:
    """Writes each original over its reconstruction, `columns` pairs side by side, as one PNG.

    Args:
        path: the PNG; its folder is made.
        originals: (N, C, H, W), as `write_grid` takes them.
        reconstructions: the same shape.
        columns: pairs per row of pairs.
        scale: whole factor of enlargement, as in `write_grid`.

    Raises:
        ValueError: the two differ in shape.
    """
    write_stacks(path, {"original": originals, "reconstruction": reconstructions}, columns, scale)


def write_stacks(
    path: Path,
    lines: Mapping[str, Tensor | npt.NDArray[Any]],
    columns: int = 8,
    scale: int | None = None,
    captions: Sequence[str] | None = None,
) -> None:
    """Writes pictures that belong together one under the other, `columns` stacks side by side, as one PNG.

    Args:
        path: the PNG; its folder is made.
        lines: name -> images (N, C, H, W), from top to bottom, as `write_grid` takes them.
        columns: stacks per row of stacks.
        scale: whole factor of enlargement, as in `write_grid`.
        captions: text under each stack, of as many lines each.

    Raises:
        ValueError: the lines differ in shape, or captions do not match them.
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
    columns = math.ceil(len(first) / num_rows)  # rows of stacks about equally long
    height, width = first.shape[1:3]
    margin = _CAPTION_HEIGHT + _GAP
    pictures = len(tiled) * (height + _GAP)
    pitch = pictures + (len(texts[0]) if texts else 0) * _CAPTION_HEIGHT + 3 * _GAP  # rows stand a little apart
    canvas = Image.new("RGB", (margin + columns * (width + _GAP), num_rows * pitch - 2 * _GAP), _PAPER)
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
            middle = _GAP + row * pitch + pictures + line * _CAPTION_HEIGHT + _CAPTION_HEIGHT // 2
            draw.text((centre, middle), _shorten(draw, words, width), _INK, _font(), anchor="mm")
    _write_png(path, canvas)


def overlay(images: Tensor, true: Tensor, found: Tensor) -> Tensor:
    """Images (N, C, H, W) uint8 tinted by masks of class numbers (N, H, W) -> (N, 3, H, W) floats in [0, 1].

    Blue where the two agree on a class other than 0, red where `found` misses it, yellow where it has one that
    `true` has not.
    """
    picture = images.float().expand(-1, 3, -1, -1) / 255.0
    for chosen, colour in (
        ((true > 0) & (found == true), (0, 114, 178)),
        ((true > 0) & (found != true), (213, 94, 0)),
        ((true == 0) & (found > 0), (240, 228, 66)),
    ):
        tinted = 0.55 * picture + 0.45 * torch.tensor(colour)[:, None, None] / 255.0
        picture = torch.where(chosen[:, None], tinted, picture)
    return picture


def write_curves(
    path: Path,
    series: Mapping[str, Sequence[float]],
    log: bool = False,
    *,
    x_label: str = "epoch",
    y_label: str = "value",
) -> None:
    """Draws named series over their position, counted from 1, as one PNG.

    Args:
        path: the PNG; its folder is made.
        series: name -> values; NaN leaves a gap.
        log: also draws them on a logarithmic axis beside the linear one (values <= 0 leave gaps there).
        x_label: what a position is.
        y_label: what the values are, with their unit where they have one.

    Raises:
        ValueError: no series at all.
    """
    if not series:
        raise ValueError("series: found none, expected at least one named list of numbers")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with plot_style():
        scales = ("linear", "log") if log else ("linear",)
        figure = Figure(figsize=(5.2 * len(scales), 3.6), dpi=110, layout="constrained")
        for axes, scale in zip(figure.subplots(1, len(scales), squeeze=False)[0], scales, strict=True):
            for name, values in series.items():
                heights = np.asarray(values, dtype=np.float64)
                heights = np.where((heights > 0) | (scale == "linear"), heights, np.nan)
                marker = "o" if len(heights) == 1 else None  # a lone point draws no line
                axes.plot(np.arange(1, len(heights) + 1), heights, label=name, marker=marker)
            axes.set(xlabel=x_label, ylabel=f"{y_label} ({scale})" if log else y_label, yscale=scale)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.legend()
        write_plot(path, figure)


@contextmanager
def plot_style() -> Iterator[None]:
    """Plots that are made and written within have the house's style, whatever the user's own is."""
    import matplotlib as mpl  # heavy, and most callers never plot

    with mpl.rc_context({**mpl.rcParamsDefault, **_STYLE, "backend": "agg"}):
        yield


def write_plot(path: Path, figure: "Figure") -> None:
    """Writes a matplotlib figure as PNG, without the version that matplotlib puts in."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def write_gif(path: Path, frames: Sequence[Path], seconds_per_frame: float = 0.5) -> None:
    """Joins pictures of one size into an endless animation; the last one stays four times as long.

    Args:
        path: the GIF; its folder is made.
        frames: picture files, in order.
        seconds_per_frame: how long each is shown, in steps of 0.01 s.

    Raises:
        ValueError: no frame, or frames that differ in size.
    """
    if not frames:
        raise ValueError("frames: found none, expected at least one picture")
    pictures = []
    for frame in frames:
        with Image.open(frame) as picture:
            pictures.append(picture.convert("RGB"))
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        raise ValueError(f"frames: expected one size, found {sorted(sizes)}")
    # One palette for all frames: with one each, still areas would flicker from frame to frame.
    num_shown = min(_PALETTE_FRAMES, len(pictures))
    shown = [pictures[i * len(pictures) // num_shown] for i in range(num_shown)]
    width, height = shown[0].size
    sheet = Image.new("RGB", (width, height * num_shown))
    for number in range(num_shown):
        sheet.paste(shown[number], (0, height * number))
    palette = sheet.quantize(256, method=Image.Quantize.MEDIANCUT)
    indexed = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    milliseconds = 10 * max(1, round(100 * seconds_per_frame))
    durations = [milliseconds] * (len(indexed) - 1) + [4 * milliseconds]
    buffer = io.BytesIO()
    indexed[0].save(buffer, "GIF", save_all=True, append_images=indexed[1:], duration=durations, loop=0)
    write_atomic(path, buffer.getvalue())


def _tiles(images: Tensor | npt.NDArray[Any], scale: int | None) -> Pixels:
    """Images (N, C, H, W) -> RGB tiles (N, H * scale, W * scale, 3)."""
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
    return ImageFont.load_default(_FONT_SIZE)  # comes with Pillow: the same letters on every machine


def _shorten(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels."""
    if draw.textlength(text, _font()) <= width:
        return text
    while text and draw.textlength(text + "…", _font()) > width:
        text = text[:-1]
    return text + "…"


def _vertical_caption(text: str, height: int) -> Image.Image:
    """A strip of `_CAPTION_HEIGHT` by `height` pixels with the text read from below."""
    strip = Image.new("RGB", (height, _CAPTION_HEIGHT), _PAPER)
    draw = ImageDraw.Draw(strip)
    draw.text((height // 2, _CAPTION_HEIGHT // 2), _shorten(draw, text, height), _INK, _font(), anchor="mm")
    return strip.transpose(Image.Transpose.ROTATE_90)


def _write_png(path: Path, canvas: Image.Image) -> None:
    pixels = np.asarray(canvas)
    if (pixels[..., :1] == pixels).all():
        canvas = canvas.convert("L")  # a third of the bytes
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())
