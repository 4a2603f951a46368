"""Reading speed: medgen's threads and a plain loop over the same files, in images per second.

python benchmarks/preprocess.py                       # generated JPEGs of 2000 and 224 pixels
python benchmarks/preprocess.py --images data/train   # the large JPEGs below a folder

The methods run in turn, round after round, so that a busy machine slows all of them; ratios are medians of the
rounds. The plain loop is OpenCV's decode, CLAHE and resize in one process, with OpenCV's default threads; the bare
decode, without CLAHE and resize, is the upper limit. Fails if medgen without reduced decode gives other pixels than
the loop.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from medgen.config import Preprocess
from medgen.ingest.formats.images import RasterFile
from medgen.ingest.transforms import preprocess_image

Squares = NDArray[np.uint8]  # (N, S, S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder; its large JPEGs are read")
    parser.add_argument("--min-side", type=int, default=600, help="minimum of the longer side in pixels")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.images is None:
            sets = [draw(Path(scratch), 40, 2000, 1800), draw(Path(scratch), 1000, 224, 224)]
        else:
            sets = [large_jpegs(arguments.images, arguments.min_side)]
        for paths in sets:
            for path in paths:
                path.read_bytes()  # into the page cache, so that the disk is not measured
            measure(paths, arguments.image_size, arguments.rounds)


def measure(paths: Sequence[Path], size: int, rounds: int) -> None:
    num_threads = len(os.sched_getaffinity(0))
    exact = Preprocess(image_size=size, fit="squash", clahe_clip=2.0, clahe_tiles=8)
    reduced = exact.model_copy(update={"reduced_decode": True})
    ways: dict[str, Callable[[], Squares | None]] = {
        "plain loop": lambda: plain_loop(paths, size),
        f"bare grey decode, {num_threads} threads": lambda: bare_decode(paths, num_threads),
        f"medgen, {num_threads} threads": lambda: threads(paths, exact, num_threads),
        f"medgen, {num_threads} threads, reduced decode": lambda: threads(paths, reduced, num_threads),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    squares: dict[str, Squares | None] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            squares[name] = way()
            seconds[name].append(time.perf_counter() - started)

    reference, _, ours, _ = squares.values()
    assert reference is not None
    table = Table("method", "images/s", "ratio (min to max)", "mean grey-value difference, of 255")
    loop = next(iter(seconds.values()))
    for name, taken in seconds.items():
        ratios = [slow / fast for slow, fast in zip(loop, taken, strict=True)]
        found = squares[name]
        difference = "" if found is None else f"{float(np.abs(found.astype(int) - reference).mean()):.3f}"
        rate = len(paths) / statistics.median(taken)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        table.add_row(name, f"{rate:.1f}", spread, difference)
    sides = " x ".join(map(str, RasterFile(paths[0], exact).read(0).size))
    Console().print(
        f"{len(paths)} files, such as of {sides}, to {size} px, {rounds} rounds, {num_threads} cores", table
    )
    if not np.array_equal(reference, ours):  # type: ignore[arg-type]
        raise SystemExit("medgen without reduced decode gives other pixels than the plain loop")


def plain_loop(paths: Sequence[Path], size: int) -> Squares:
    cv2.setNumThreads(-1)
    clahe = cv2.createCLAHE(2.0, (8, 8))
    squares = []
    for path in paths:
        grey = clahe.apply(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE))
        squares.append(cv2.resize(grey, (size, size), interpolation=cv2.INTER_AREA))
    return np.stack(squares)


def bare_decode(paths: Sequence[Path], num_threads: int) -> None:
    cv2.setNumThreads(1)
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in pool.map(lambda path: cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) is None, paths):
            pass


def threads(paths: Sequence[Path], preprocess: Preprocess, num_threads: int) -> Squares:
    def read(path: Path) -> Squares:
        with RasterFile(path, preprocess) as file:
            return preprocess_image(file.read(0).pixels, preprocess)

    cv2.setNumThreads(1)
    with ThreadPoolExecutor(num_threads) as pool:
        return np.concatenate(list(pool.map(read, paths)))


def large_jpegs(folder: Path, min_side: int) -> list[Path]:
    small = Preprocess(image_size=16, reduced_decode=True)
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")]
    large = [path for path in paths if max(RasterFile(path, small).read(0).size) >= min_side]
    if not large:
        raise SystemExit(f"{folder}: no JPEG of {min_side} pixels or more")
    return large


def draw(folder: Path, num_images: int, width: int, height: int) -> list[Path]:
    """Write JPEGs of smooth shapes with noise, quality 90: as large on disk as an X-ray of that size."""
    generator = np.random.default_rng(0)
    paths = []
    for number in range(num_images):
        shapes = cv2.resize(generator.uniform(20, 235, (12, 14)), (width, height), interpolation=cv2.INTER_CUBIC)
        image = shapes + generator.normal(0, 4, shapes.shape)
        paths.append(folder / f"{width}_{number}.jpg")
        cv2.imwrite(str(paths[-1]), image.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])
    return paths


if __name__ == "__main__":
    main()
