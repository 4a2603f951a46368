"""Latents on disk: of all images, encoded once, continued after a kill, and read like a tensor."""

import shutil
import subprocess
import sys
import threading
from collections import namedtuple

import numpy as np
import pytest
import torch

from medgen.config import Model, Preprocess, Prior, Tracking
from medgen.data.store import open_store
from medgen.errors import UserError
from medgen.models import build_model, bundle
from medgen.models.bundle import BundleInfo
from medgen.models.spatial_vae import SpatialVAE
from medgen.training import latents, prior
from medgen.training.distributed import World

ONE = World(0, 1, torch.device("cpu"))
SIZES = {"base_channels": 8, "latent_channels": 4, "latent_size": 4, "attention_resolutions": ()}
VAE = Model(max_channels=16, **SIZES)
VQVAE = Model(name="vqvae", num_embeddings=16, blocks_per_stage=1, **SIZES)


@pytest.fixture
def project(tiny_project):
    """The tiny store and an untrained model of it."""
    return with_model(tiny_project, VAE)


def with_model(project, params, seed=0):
    store = open_store(project.dataset)
    torch.manual_seed(seed)
    model = build_model(params, store.image_shape, len(store.classes))
    data = (store.image_shape, store.classes, store.fingerprint)
    info = BundleInfo(params, Preprocess(image_size=32, clahe_tiles=2), *data, "run0", torch.__version__)
    bundle.save(project.model, model, info)
    return project


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(latents, "BATCH_SIZE", 4)
    monkeypatch.setattr(latents, "SHARD_SIZE", 8)


def encode(project, world=ONE):
    store = open_store(project.dataset)
    model, info = bundle.load_for(store, project.model)
    return latents.encode_dataset(store, model, bundle.digest(project.model), project.runs / info.run, world)


def files(project):
    return {path.relative_to(project.runs): path.read_bytes() for path in project.runs.rglob("latents_*/*/*")}


@pytest.fixture
def encoded_batches(monkeypatch):
    """Sizes of the batches that are encoded from now on."""
    sizes, gather = [], latents.Loader.gather
    monkeypatch.setattr(latents.Loader, "gather", lambda self, rows: sizes.append(len(rows)) or gather(self, rows))
    return sizes


def test_a_second_command_waits_for_the_encoding_of_the_first(project, small_shards, encoded_batches, monkeypatch):
    gather = latents.Loader.gather
    second = threading.Thread(target=encode, args=(project,))

    def start_second(self, rows):
        if not second.ident:
            second.start()
            second.join(timeout=0.5)  # without the lock it would encode everything, and rename the first one's files
        return gather(self, rows)

    monkeypatch.setattr(latents.Loader, "gather", start_second)
    encode(project)
    second.join()
    assert sum(encoded_batches) == sum(open_store(project.dataset).counts[split] for split in ("train", "val"))


def test_all_images_are_encoded_in_order_with_their_mean_posterior_variance(project, small_shards):
    model, _ = bundle.load(project.model)
    split = open_store(project.dataset).split("train")
    with torch.no_grad():
        latent = model.encode(torch.from_numpy(np.array(split.images[:])).float() / 255)
    train, val = encode(project)
    torch.testing.assert_close(train.means[:], latent.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(train.variance, latent.logvar.exp().mean(0), rtol=1e-4, atol=1e-5)
    assert train.labels.tolist() == split.labels.tolist()
    assert len(val.means) == len(open_store(project.dataset).split("val"))
    assert len(list(project.runs.glob("*/latents_*/train/*.variance.npy"))) == -(-len(split) // 8) > 2


def test_they_are_read_like_a_tensor(project, small_shards):
    found, whole = encode(project)[0].means, encode(project)[0].means[:]
    assert found.shape == tuple(whole.shape) and len(found) == len(whole)
    for rows in (slice(0, 0), slice(3, 21), slice(None), torch.tensor([9, 0, 17, 9, len(whole) - 1]), torch.arange(0)):
        assert torch.equal(found[rows], whole[rows])


def test_a_codebooks_latents_are_stored_as_codes_of_a_byte(tiny_project, small_shards):
    project = with_model(tiny_project, VQVAE)
    model, _ = bundle.load(project.model)
    images = torch.from_numpy(np.array(open_store(project.dataset).split("train").images[:])).float() / 255
    found = encode(project)[0].means
    with torch.no_grad():
        assert torch.equal(found[:], model.encode(images).mean)
    shard = np.load(next(project.runs.glob("*/latents_*/train/00000.npy")))
    assert shard.dtype == np.uint8 and shard.shape == (8, 4, 4)


def test_the_next_prior_reads_what_the_first_encoded(project, encoded_batches):
    prior.run(project, prior=Prior(name="gaussian"), tracking=Tracking(enabled=False))
    assert sum(encoded_batches) > 0
    encoded_batches.clear()
    prior.run(project, prior=Prior(name="gmm", components=(1,)), tracking=Tracking(enabled=False))
    assert encoded_batches == []


def test_a_killed_encoding_continues(project, small_shards, encoded_batches, monkeypatch):
    encode(project)
    whole, num_batches = files(project), len(encoded_batches)
    shutil.rmtree(project.runs)
    encode_batch, count = SpatialVAE.encode, iter(range(100))

    def dies(self, *arguments):
        if next(count) == 5:
            raise KeyboardInterrupt
        return encode_batch(self, *arguments)

    monkeypatch.setattr(SpatialVAE, "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        encode(project)
    assert not list(project.runs.rglob("*.tmp")), "after an error, as on a full disk, no half-written file is left"
    monkeypatch.setattr(SpatialVAE, "encode", encode_batch)
    encoded_batches.clear()
    encode(project)
    assert files(project) == whole
    assert len(encoded_batches) == num_batches - 4, "the two complete shards are not encoded again"


def test_a_damaged_shard_is_encoded_again(project, small_shards, encoded_batches):
    encode(project)
    whole = files(project)
    encoded_batches.clear()
    for name, content in (("00000.npy", b""), ("00001.npy", b"\x93NUMPY"), ("00002.npy", None)):
        (path,) = project.runs.glob(f"*/latents_*/train/{name}")
        path.write_bytes(path.read_bytes()[:-4] if content is None else content)
    encode(project)
    assert files(project) == whole and encoded_batches == [4] * 6


def test_the_latents_of_an_earlier_model_are_removed(project):
    encode(project)
    (first,) = project.runs.glob("*/latents_*")
    encode(with_model(project, VAE, seed=1))
    (second,) = project.runs.glob("*/latents_*")
    assert first != second


def test_a_full_disk_is_named_before_anything_is_written(project, monkeypatch):
    monkeypatch.setattr(latents.shutil, "disk_usage", lambda _: namedtuple("usage", "free")(1000))
    with pytest.raises(UserError, match=r"latents of the images need 0\.0 GB, and the disk has 0\.0 GB free"):
        encode(project)
    assert not files(project)


TWO = """
from pathlib import Path
from medgen.config import Prior, Project, Tracking
from medgen.training import latents, prior
latents.BATCH_SIZE, latents.SHARD_SIZE = 4, 8
prior.run(Project(Path(".")), prior=Prior(name="gmm"), tracking=Tracking(enabled=False))
"""


@pytest.mark.slow
def test_two_processes_write_what_one_writes(project, small_shards):
    prior.run(project, prior=Prior(name="gmm"), tracking=Tracking(enabled=False))
    whole, fitted = files(project), (project.prior / "prior.safetensors").read_bytes()
    shutil.rmtree(project.runs)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--no-python"]
    done = subprocess.run(
        [*command, sys.executable, "-c", TWO], cwd=project.root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert files(project) == whole and (project.prior / "prior.safetensors").read_bytes() == fitted
