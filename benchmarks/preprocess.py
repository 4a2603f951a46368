"""Reading speed: our threads against a plain loop over the same files, in images per second.

python benchmarks/preprocess.py                       # 2000-pixel JPEGs that it draws itself
python benchmarks/preprocess.py --images data/train   # the large JPEGs below a folder

The ways are run in turn, round after round, so that a busy machine slows all of them; ratios are medians of the
rounds. The plain loop is OpenCV's decode, CLAHE and resize in one process, with OpenCV's own threads left as they
are. Fails when the exact way gives other pixels than the loop.
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

from medgen.data.images import read_image, to_square

Squares = NDArray[np.uint8]  # (N, S, S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder whose large JPEGs are read")
    parser.add_argument("--min-side", type=int, default=600, help="smaller files are left out")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, least = arguments.images, arguments.min_side
        paths = draw(Path(scratch)) if folder is None else large_jpegs(folder, least)
        for path in paths:
            path.read_bytes()  # into the page cache: decoding is measured, not the disk
        measure(paths, arguments.image_size, arguments.rounds)


def measure(paths: Sequence[Path], size: int, rounds: int) -> None:
    num_threads = len(os.sched_getaffinity(0))
    ways: dict[str, Callable[[], Squares]] = {
        "plain loop": lambda: plain_loop(paths, size),
        f"medgen, {num_threads} threads": lambda: threads(paths, size, num_threads, None),
        f"medgen, {num_threads} threads, reduced decode": lambda: threads(paths, size, num_threads, size),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    squares: dict[str, Squares] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            squares[name] = way()
            seconds[name].append(time.perf_counter() - started)

    reference, exact, _reduced = squares.values()
    table = Table("way", "images/s", "ratio (min to max)", "mean difference of 255")
    loop = next(iter(seconds.values()))
    for name, taken in seconds.items():
        ratios = [slow / fast for slow, fast in zip(loop, taken, strict=True)]
        difference = float(np.abs(squares[name].astype(int) - reference).mean())
        rate = len(paths) / statistics.median(taken)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        table.add_row(name, f"{rate:.1f}", spread, f"{difference:.3f}")
    Console().print(f"{len(paths)} files, {size} px, {rounds} rounds, {num_threads} cores", table)
    if not (reference == exact).all():
        raise SystemExit("the exact way gives other pixels than the plain loop")


def plain_loop(paths: Sequence[Path], size: int) -> Squares:
    cv2.setNumThreads(-1)
    clahe = cv2.createCLAHE(2.0, (8, 8))
    squares = []
    for path in paths:
        grey = clahe.apply(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE))
        squares.append(cv2.resize(grey, (size, size), interpolation=cv2.INTER_AREA))
    return np.stack(squares)


def threads(paths: Sequence[Path], size: int, num_threads: int, reduce_to: int | None) -> Squares:
    cv2.setNumThreads(1)
    with ThreadPoolExecutor(num_threads) as pool:
        read = pool.map(lambda path: to_square(read_image(path, reduce_to).pixels, size, "squash", 2.0, 8), paths)
        return np.stack(list(read))


def large_jpegs(folder: Path, min_side: int) -> list[Path]:
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")]
    large = [path for path in paths if max(read_image(path, 1).size) >= min_side]
    if not large:
        raise SystemExit(f"{folder}: no JPEG of {min_side} pixels or more")
    return large


def draw(folder: Path, num_images: int = 40) -> list[Path]:
    """Smooth shapes under film noise, 2000 x 1800, quality 90: as large on disk as an X-ray."""
    generator = np.random.default_rng(0)
    paths = []
    for number in range(num_images):
        shapes = cv2.resize(generator.uniform(20, 235, (12, 14)), (2000, 1800), interpolation=cv2.INTER_CUBIC)
        film = shapes + generator.normal(0, 4, shapes.shape)
        paths.append(folder / f"{number}.jpg")
        cv2.imwrite(str(paths[-1]), film.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])
    return paths


if __name__ == "__main__":
    main()
