"""Reading speed by source: a folder by threads, by a Dask cluster, and a bucket on S3, all on this machine.

python benchmarks/sources.py [--images 2000] [--rounds 3]

Needs the extras dask and s3, and moto[s3]. The sources are read in turn, round after round, by `read_images` as
`medgen preprocess` does. Cluster and server share the cores, so this shows their overhead, not their gain: a cluster
pays on several machines.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from distributed import LocalCluster
from moto.server import ThreadedMotoServer
from PIL import Image
from rich.console import Console
from rich.table import Table
from s3fs import S3FileSystem

from medgen.config import Data, Preprocess
from medgen.data.s3 import S3Folder
from medgen.ingest import dataset_scan
from medgen.ingest.folders import Folder
from medgen.ingest.formats.raw import RawImage
from medgen.ingest.reading import read_images
from medgen.ingest.transforms import preprocess_image
from medgen.machine import num_cores

SETTINGS = Preprocess(image_size=64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="number of drawn images of 512 pixels")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "benchmark",
        "AWS_SECRET_ACCESS_KEY": "benchmark",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with (
        tempfile.TemporaryDirectory() as scratch,
        LocalCluster(n_workers=num_cores(), threads_per_worker=1, dashboard_address=None) as cluster,
    ):
        folder = Path(scratch, "images")
        draw(folder, arguments.images)
        S3FileSystem().mkdir("images")
        S3FileSystem().put(str(folder), "images", recursive=True)
        on_cluster = SETTINGS.model_copy(update={"scheduler": cluster.scheduler_address})
        measure(
            {
                f"folder, {num_cores()} threads": lambda: read(folder, SETTINGS),
                f"folder, Dask with {num_cores()} workers": lambda: read(folder, on_cluster),
                "S3": lambda: read(S3Folder("s3://images/images"), SETTINGS),
            },
            arguments.images,
            arguments.rounds,
        )
    server.stop()


def draw(folder: Path, num_images: int) -> None:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(num_images):
        coarse = Image.fromarray(generator.integers(0, 256, (32, 32), np.uint8))
        coarse.resize((512, 512), Image.Resampling.BICUBIC).save(folder / f"{number:06}.png")


def read(folder: Folder, preprocess: Preprocess) -> None:
    def transform(_record: object, raw: RawImage, _mask: object) -> np.ndarray:
        return preprocess_image(raw.pixels, preprocess)

    records = dataset_scan.scan(folder, Data(), preprocess).records
    assert all(result.value is not None for result in read_images(folder, records, preprocess, transform))


def measure(sources: dict[str, Callable[[], None]], num_images: int, rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in sources}
    sources[list(sources)[1]]()  # the workers import medgen
    for _ in range(rounds):
        for name, source in sources.items():
            started = time.perf_counter()
            source()
            seconds[name].append(time.perf_counter() - started)
    table = Table("source", "images/s", "ratio (min to max)")
    first = next(iter(seconds.values()))
    for name, taken in seconds.items():
        ratios = [reference / own for reference, own in zip(first, taken, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        table.add_row(name, f"{num_images / statistics.median(taken):.1f}", spread)
    Console().print(f"{num_images} images of 512 px to 64 px, {rounds} rounds", table)


if __name__ == "__main__":
    main()
