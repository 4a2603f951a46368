"""Reading on a Dask cluster gives the bytes that threads give, also if workers die; failures are one message."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medgen.config import Data, Preprocess, Project
from medgen.errors import UserError
from medgen.ingest import audit, cluster, dataset_scan, preprocess
from medgen.ingest.formats.raw import RawImage
from medgen.ingest.reading import hash_sources, read_images

SETTINGS = {"image_size": 16, "max_rejected": 0.1}


class Cluster:
    """A scheduler in this process, with one process for each worker."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler.scheduler
        self.address: str = scheduler.scheduler_address
        self.workers: list[subprocess.Popen[bytes]] = []

    def require(self, count: int) -> str:
        """Start workers until there are that many; returns the address."""
        from distributed import Client

        self.workers = [worker for worker in self.workers if worker.poll() is None]
        options = ["--no-nanny", "--nthreads", "1", "--no-dashboard", "--death-timeout", "60"]
        for _ in range(count - len(self.workers)):
            command = [sys.executable, "-m", "dask", "worker", self.address, *options]
            self.workers.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(count, timeout=300)
        return self.address

    def kill_one(self) -> None:
        self.workers[0].kill()
        self.workers[0].wait()


@pytest.fixture(scope="module")
def dask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    distributed = pytest.importorskip("distributed")
    import dask

    scratch = str(tmp_path_factory.mktemp("workers"))
    with (
        pytest.MonkeyPatch.context() as patch,
        dask.config.set({"temporary_directory": scratch}),
        distributed.LocalCluster(n_workers=0, dashboard_address=None, silence_logs=100) as scheduler,
    ):
        patch.setenv("DASK_TEMPORARY_DIRECTORY", scratch)
        cluster = Cluster(scheduler)
        yield cluster
        for worker in cluster.workers:
            worker.kill()
            worker.wait()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """300 images of a file each, one of them damaged, and 2,100 in one file."""
    folder = tmp_path / "threads" / "data"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(300):
        Image.fromarray(generator.integers(0, 255, (24, 20), np.uint8)).save(folder / f"{number:03}.png")
    (folder / "150.png").write_bytes(b"no image")
    np.savez(folder / "many.npz", train_images=generator.integers(0, 255, (2100, 16, 16), np.uint8))
    return folder


@pytest.mark.slow
def test_the_store_has_the_same_bytes_although_a_worker_is_killed(
    images: Path, dask: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, workers = Project(images.parent), Project(images.parent.with_name("workers"))
    workers.root.mkdir()
    workers.root.joinpath("data").symlink_to(images)
    expected = preprocess.run(threads, data=Data(), preprocess=Preprocess(**SETTINGS))

    def killing(*arguments: Any) -> Iterator[Any]:
        for number, result in enumerate(read_images(*arguments)):
            if number == 0:
                dask.kill_one()
            yield result

    settings = Preprocess(**SETTINGS, scheduler=dask.require(2))
    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "read_images", killing)
        store = preprocess.run(workers, data=Data(), preprocess=settings)
    files = {path.relative_to(expected.folder) for path in expected.folder.rglob("*") if path.is_file()}
    assert files == {path.relative_to(store.folder) for path in store.folder.rglob("*") if path.is_file()}
    for name in files:
        assert (store.folder / name).read_bytes() == (expected.folder / name).read_bytes(), name

    def refuse(*_: Any) -> None:
        raise AssertionError("the store was made again")

    monkeypatch.setattr(preprocess, "_build", refuse)  # the same sources, read with and without the cluster
    preprocess.run(workers, data=Data(), preprocess=Preprocess(**SETTINGS))
    preprocess.run(threads, data=Data(), preprocess=settings)


@pytest.mark.slow
def test_a_file_that_kills_its_workers_is_named(images: Path, dask: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask.scheduler, "allowed_failures", 0)
    settings = Preprocess(**SETTINGS, scheduler=dask.require(2))
    records = dataset_scan.scan(images, Data(), settings).records

    def transform(record: Any, _raw: RawImage, _mask: RawImage | None, _paired: object) -> None:
        if record.path == "100.png":
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(UserError, match=r"^100\.png: each worker of tcp://.* that read this file died"):
        list(read_images(images, records, settings, transform))


@pytest.mark.slow
def test_an_audit_finds_the_same(images: Path, dask: Cluster, tmp_path: Path) -> None:
    results = []
    for scheduler in (None, dask.require(1)):
        settings, out = Preprocess(**SETTINGS, scheduler=scheduler), tmp_path / str(len(results))
        audit.run(Project(tmp_path), data=Data(), preprocess=settings, path=images, out=out)
        results.append([(out / name).read_bytes() for name in ("audit.json", "audit.html")])
    assert results[0] == results[1]


@pytest.mark.slow
def test_workers_without_the_images_or_with_other_code_are_one_message(
    images: Path, dask: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Preprocess(**SETTINGS, scheduler=dask.require(1))
    records = dataset_scan.scan(images, Data(), settings).records
    with pytest.raises(UserError, match=r"elsewhere: not found by a worker on "):
        list(hash_sources(images.with_name("elsewhere"), records, settings))
    monkeypatch.setattr(cluster, "environment", lambda: "medgen of tomorrow")
    with pytest.raises(UserError, match="expected medgen of tomorrow, as on this machine"):
        list(hash_sources(images, records, settings))


def test_a_scheduler_that_does_not_answer_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(cluster, "_CONNECT_SECONDS", 0.1)
    with pytest.raises(UserError, match=r"tcp://127\.0\.0\.1:9 does not answer .* `dask scheduler`"):
        list(cluster.map_on_cluster("tcp://127.0.0.1:9", len, []))


def test_without_dask_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"uv sync --extra dask.*medgen\[dask\]"):
        list(cluster.map_on_cluster("tcp://127.0.0.1:9", len, []))


def test_the_scheduler_is_in_no_hash_and_no_file() -> None:
    plain, on_cluster = Preprocess(), Preprocess(scheduler="tcp://node:8786")
    assert plain.model_dump_json() == on_cluster.model_dump_json()


@pytest.mark.parametrize("scheduler", ["node:8786", "http://node:8787", "tcp://node"])
def test_another_address_is_refused(scheduler: str) -> None:
    with pytest.raises(ValueError, match="scheduler"):
        Preprocess(scheduler=scheduler)
