"""Sums, means and rows of several processes, in the order of their ranks."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medgen.data.store import StoreWriter
from medgen.tracking import history
from medgen.training.distributed import World

EXCHANGE = """
import torch
from medgen.training.distributed import join
with join("cpu") as world:
    rank = world.rank
    assert world.sum_of({"a": rank + 1.0, "b": 0.5}) == {"a": 6.0, "b": 1.5}
    assert world.mean_of({"a": rank + 1.0}) == {"a": 2.0}
    for dtype in (torch.uint8, torch.uint16, torch.int64, torch.float32, torch.bool):
        part = torch.full((rank, 2), rank, dtype=dtype)  # none of the first, one of the second, two of the third
        assert torch.equal(world.concat(part), torch.tensor([[1, 1], [2, 2], [2, 2]]).to(dtype))
    assert torch.equal(world.concat(torch.arange(3).expand(2, 3).T), torch.arange(3).repeat(3)[:, None].expand(9, 2))
"""


def test_processes_exchange_sums_and_rows_in_the_order_of_their_ranks():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--standalone", "--no-python"]
    done = subprocess.run([*command, sys.executable, "-c", EXCHANGE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_one_process_exchanges_nothing():
    world = World(0, 1, torch.device("cpu"))
    rows = torch.rand(3, 2)
    assert world.sum_of({"a": 1.5}) == world.mean_of({"a": 1.5}) == {"a": 1.5}
    assert torch.equal(world.concat(rows), rows)


STAGES = """
import contextlib, json, os, sys
from pathlib import Path
from medgen import cli
from medgen.training import distributed, extractor, prior, refiner, train
modules = {"features": extractor, "train": train, "prior": prior, "refiner": refiner}
prior.LatentTask.num_batches = 10
with distributed.join("cpu") as world:
    for module in modules.values():
        module.join = lambda device: contextlib.nullcontext(world)  # one group for all cases
    for case in sys.argv[1:]:
        os.chdir(case)
        world.barrier()
        for stage in json.loads(Path("stages.json").read_text()):
            cli._call(modules[stage].run, Path("params.yaml"), None)
            world.barrier()
"""
TRAIN = {
    "batch_size": 8,
    "ema_decay": 0.9,
    "horizontal_flip": True,
    "phases": {"a": {"epochs": 2, "learning_rate": 1e-3, "beta": {"end": 1.0}}},
}
SMALL = {"base_channels": 8, "latent_channels": 4}
# a bias before BatchNorm has no gradient but rounding, which Adam would divide by its own size
SGD = {**TRAIN, "phases": {"a": {**TRAIN["phases"]["a"], "optimizer": "sgd", "learning_rate": 1e-2}}}
PARTS = {"epochs": 1, "channels": 8, "blocks": 2, "batch_size": 8, "dropout": 0.1}
CASES = {
    "spatial_vae": {"model": {"name": "spatial_vae", "latent_size": 8, **SMALL}, "loss": {"free_bits": 0.5}},
    "accumulated": {
        "model": {"name": "spatial_vae", "latent_size": 8, **SMALL},
        "train": {**TRAIN, "accumulate_steps": 2},
    },
    "vae": {"model": {"name": "vae", **SMALL}, "loss": {"weights": {"sigma": 1.0}}, "train": SGD},
    "cvae": {"model": {"name": "cvae", **SMALL}, "train": SGD},
    "autoencoder": {"model": {"name": "autoencoder", **SMALL}, "train": SGD},
    **{
        f"vqvae_{kind}": {"model": {"name": "vqvae", "codebook": kind, "num_embeddings": 16, "latent_size": 8, **SMALL}}
        for kind in ("gradient", "ema", "cosine")
    },
    "unet": {
        "model": {"name": "unet", "base_channels": 4},
        "loss": {"weights": {"bce": 1.0, "dice": 1.0}},
        "train": {**TRAIN, "augment": {"affine": {"degrees": 20.0}, "intensity": {"noise": 0.1}}},
    },
    "features": {"features": {"width": 8, "epochs": 1, "batch_size": 8}},
    "flow": {"model": {"name": "spatial_vae", "latent_size": 8, **SMALL}, "prior": {"name": "flow", **PARTS}},
    "tokens": {
        "model": {"name": "vqvae", "num_embeddings": 16, "latent_size": 8, **SMALL},
        "prior": {"name": "tokens", **PARTS},
    },
    "refiner": {
        "model": {"name": "vae", **SMALL},
        "train": SGD,
        "prior": {"name": "gaussian"},
        "refiner": {"enabled": True, **PARTS},
    },
}


def write_case(folder, store, params):
    stages = ["features"] if "features" in params else ["train"]
    stages += [stage for stage in ("prior", "refiner") if stage in params]
    (folder / "artifacts").mkdir(parents=True)
    (folder / "artifacts" / "dataset").symlink_to(store)
    (folder / "params.yaml").write_text(json.dumps({"train": TRAIN, "tracking": {"enabled": False}, **params}))
    (folder / "stages.json").write_text(json.dumps(stages))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """24 train and 40 val images at 32 px with masks and two classes."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("store") / "dataset"
    splits = ["train"] * 24 + ["val"] * 40 + ["test"] * 4
    with StoreWriter(folder, (1, 32, 32), with_masks=True) as writer:
        for number, split in enumerate(splits):
            rows, columns = np.mgrid[:32, :32] / 32 - random.uniform(0.4, 0.6)
            mask = np.hypot(rows, columns) < 0.25 if number % 2 else abs(columns) < 0.12
            image = (40 + 160 * mask * (0.9 - rows) + random.normal(0, 8, (32, 32))).clip(0, 255).astype(np.uint8)
            row = {
                "path": f"{split}/{number}.png",
                "patient": str(number),
                "label": "disc" if number % 2 else "bar",
                "mask": "m",
            }
            writer.add(image[None], mask[None].astype(np.uint8), row)
        writer.commit(splits, [], {}, "")
    return folder


@pytest.fixture(scope="module")
def results(store, tmp_path_factory):
    """Folders of all cases, trained by one process and by two."""
    root = tmp_path_factory.mktemp("cases")
    launchers = {
        "one": [sys.executable],
        "two": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"],
    }
    (root / "stages.py").write_text(STAGES)
    for name, launcher in launchers.items():
        for case, params in CASES.items():
            write_case(root / name / case, store, params)
        command = [*launcher, str(root / "stages.py"), *(str(root / name / case) for case in CASES)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_would(case, results):
    one, two = (results / name / case for name in ("one", "two"))
    for path in one.glob("artifacts/*/*.safetensors"):
        weights = load_file(two / path.relative_to(one))
        for key, value in load_file(path).items():
            torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-4)
    records = [list(history(path.parent)) for path in sorted(one.glob("runs/**/history.jsonl"))]
    assert records
    for path, reference in zip(sorted(two.glob("runs/**/history.jsonl")), records, strict=True):
        for record, expected in zip(history(path.parent), reference, strict=True):
            assert {key: record[key] for key in expected if not key.startswith("run/")} == pytest.approx(
                {key: value for key, value in expected.items() if not key.startswith("run/")}, rel=1e-3, abs=1e-5
            )
