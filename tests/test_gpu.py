"""Checks of what differs on a GPU: compiled bf16 steps, the guard without host waits, resident data, resume, NCCL.

`pytest -m gpu` runs the tests on a GPU and skips each by name without one; the same tests on a CPU are always run.
`python benchmarks/gpu.py` runs both and measures speed and memory.
"""

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medgen.config import Loss, Model, Phase, Prior, Tracking, Train
from medgen.data.store import StoreWriter, open_store
from medgen.errors import NonFiniteError
from medgen.models import GenerativeModel, bundle
from medgen.tracking import history
from medgen.training import latents, prior, train
from medgen.training.distributed import World, pick_device
from medgen.training.loader import Loader
from medgen.training.loop import train_epoch
from medgen.training.progress import Display
from medgen.training.state import TrainState

MODEL = Model(base_channels=8, latent_size=8, latent_channels=4, attention_resolutions=())
PHASES = (Phase(name="reconstruct", epochs=2, learning_rate=1e-3),)
OFF = Tracking(enabled=False)
BAD_STEP = 3


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The CPU, and the first GPU; skips by name without one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{request.node.originalname}: no GPU, torch.cuda.is_available() is False")
    return request.param


def params(device, **changes):
    settings = {"device": device, "compile": "off", "batch_size": 4, "phases": PHASES, "checkpoint_seconds": 3600}
    return Train(**settings | changes)


def test_images_of_16_bits_keep_their_values(tmp_path, device):
    images = np.random.default_rng(0).integers(0, 65536, (12, 1, 16, 16)).astype(np.uint16)
    with StoreWriter(tmp_path / "dataset", (1, 16, 16), with_masks=False, bits=16) as writer:
        for number, image in enumerate(images):
            writer.add(image, None, {"path": f"{number}.png"})
        store = writer.commit(["train"] * 12, [], {"bits": 16}, "")
    loader = Loader(store.split("train"), 4, device)
    batches = [*(loader.batch(position) for position in range(3)), *loader.sequential(), loader.gather(torch.arange(5))]
    for batch in batches:
        expected = images[batch.index.numpy()] / np.float32(65535)
        assert np.array_equal(batch.image.cpu().numpy(), expected)


def run(project, train_params):
    scratch = train.run(project, model=MODEL, loss=Loss(), train=train_params, tracking=OFF)
    return scratch, load_file(project.model / "model.safetensors")


def state_of(project, train_params):
    """A training that has not begun."""
    world = World(0, 1, pick_device(train_params.device))
    task = train.ModelTask(project, world, MODEL, Loss(), train_params)
    return TrainState(task, world, project.runs / "state")


def train_one_epoch(state):
    state.resume()
    with Display(0, 1, False) as display:
        return train_epoch(state, state.next_phase(), display)


def break_step(monkeypatch, times=10):
    """Make the loss of step BAD_STEP NaN the first `times` it is computed, and return the positions of all steps."""
    objective, batch = train.ModelTask.objective, train.ModelTask.batch
    positions, left = [], iter(range(times))

    def remember(self, position):
        positions.append(position)
        return batch(self, position)

    def broken(self, *arguments):
        losses = objective(self, *arguments)
        is_bad = positions[-1] == BAD_STEP and next(left, None) is not None
        return dataclasses.replace(losses, total=losses.total * torch.nan) if is_bad else losses

    monkeypatch.setattr(train.ModelTask, "batch", remember)
    monkeypatch.setattr(train.ModelTask, "objective", broken)
    return positions


def test_compiled_half_precision_trains_as_float32_on_a_cpu(device, tiny_project, tmp_path):
    """By default a GPU compiles and uses bf16; the losses are those of plain float32 within a few percent."""
    plain, _ = run(tiny_project, params("cpu", precision="fp32"))
    expected = [record["val/loss"] for record in history(plain)]
    shutil.rmtree(tiny_project.runs)
    default, _ = run(tiny_project, params(device, compile="auto", precision="auto"))
    assert [record["val/loss"] for record in history(default)] == pytest.approx(expected, rel=0.05)


def test_the_update_of_a_nonfinite_step_and_all_later_ones_are_skipped(device, tiny_project, monkeypatch):
    """The weights that the guard leaves are those of a training that ended before the bad step."""
    good = state_of(tiny_project, params(device))
    good.task.num_batches = BAD_STEP
    assert train_one_epoch(good)
    shutil.rmtree(tiny_project.runs)
    positions = break_step(monkeypatch)
    bad = state_of(tiny_project, params(device))
    bad.task.num_batches = 8
    bad.guard.read_every = 5  # the steps 3 and 4 are done before the host looks
    with pytest.raises(NonFiniteError, match=f"not finite at step {BAD_STEP}"):
        train_one_epoch(bad)
    assert positions == [0, 1, 2, 3, 4, BAD_STEP], "the last repeats the bad step for the report"
    (report,) = tiny_project.runs.glob(f"state/nonfinite_step_{BAD_STEP}_rank_0.json")
    assert len(json.loads(report.read_text())["files"]) == 4
    pairs = zip(good.model.state_dict().items(), bad.model.state_dict().values(), strict=True)
    for (name, expected), found in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_a_rollback_repeats_from_the_checkpoint_and_ends(device, tiny_project, monkeypatch):
    positions = break_step(monkeypatch, times=2)  # the step, and its repetition for the report
    scratch, weights = run(tiny_project, params(device, on_nonfinite="rollback"))
    assert len(history(scratch)) == 2 and positions.count(0) == 2
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


def test_batches_are_the_same_from_the_devices_memory_and_from_files(device, tiny_store, monkeypatch):
    split = open_store(tiny_store).split("train")
    expected = Loader(split, 4, "cpu", horizontal_flip=True)
    resident = Loader(split, 4, device, horizontal_flip=True)
    if device == "cuda":
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 0))  # full: read for each step
    streamed = Loader(split, 4, device, horizontal_flip=True)
    for position in range(2 * expected.num_batches):
        of_cpu = expected.batch(position)
        for loader in (resident, streamed):
            batch = loader.batch(position)
            assert torch.equal(batch.image.cpu(), of_cpu.image) and torch.equal(batch.label.cpu(), of_cpu.label)


def test_a_killed_training_resumes(device, tiny_project, monkeypatch):
    """Bit for bit on a CPU; on a GPU within the rounding of its sums, whose order is not fixed."""
    _, whole = run(tiny_project, params(device))
    shutil.rmtree(tiny_project.runs)
    batch, number = train.ModelTask.batch, itertools.count()

    def killed(self, position):
        if next(number) == self.num_batches + 2:
            raise KeyboardInterrupt
        return batch(self, position)

    monkeypatch.setattr(train.ModelTask, "batch", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_project, params(device))
    monkeypatch.setattr(train.ModelTask, "batch", batch)
    _, resumed = run(tiny_project, params(device))
    tolerance = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 1e-2, "atol": 1e-3}
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, **tolerance)


def test_a_model_and_its_latents_are_the_same_on_a_cpu(device, tiny_project):
    _, _ = run(tiny_project, params(device))
    store, found = open_store(tiny_project.dataset), {}
    for where in ("cpu", device):
        model, _ = bundle.load(tiny_project.model, where)
        assert isinstance(model, GenerativeModel)
        images = torch.from_numpy(np.array(store.split("val").images[:])).to(where).float() / 255
        with torch.no_grad():
            decoded = model.reconstruct(images).cpu()
        folder, world = tiny_project.root / f"latents_{where}", World(0, 1, torch.device(where))
        found[where] = decoded, latents.encode(model, store.split("val"), folder, world).means[:]
    for one, other in zip(*found.values(), strict=True) if device != "cpu" else ():
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    assert prior.run(tiny_project, prior=Prior(name="gaussian"), tracking=OFF) is not None


NCCL = """
import sys, torch
import torch.distributed as dist
import os
device, backend = sys.argv[1], "nccl" if sys.argv[1] == "cuda" else "gloo"
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
if device == "cuda":
    torch.cuda.set_device(rank)
dist.init_process_group(backend, rank=rank, world_size=size)
total = torch.full((3,), rank + 1.0, device=device)
dist.all_reduce(total)
assert total.tolist() == [size * (size + 1) / 2] * 3, total
dist.destroy_process_group()
"""


def torchrun(processes, *command):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_one_process_exchanges_with_the_devices_library(device, tmp_path):
    (tmp_path / "exchange.py").write_text(NCCL)
    torchrun(1, str(tmp_path / "exchange.py"), device)


@pytest.fixture
def two_gpus(request):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{request.node.name}: needs 2 GPUs, found {torch.cuda.device_count()}")


@pytest.mark.gpu
def test_two_gpus_exchange_with_nccl(two_gpus, tmp_path):
    (tmp_path / "exchange.py").write_text(NCCL)
    torchrun(2, str(tmp_path / "exchange.py"), "cuda")


@pytest.mark.gpu
def test_two_gpus_train_as_one(two_gpus, tiny_project):
    sections = {"model": MODEL.model_dump(mode="json"), "train": params("cuda").model_dump(mode="json")}
    (tiny_project.root / "params.yaml").write_text(json.dumps({**sections, "tracking": {"enabled": False}}))
    losses = []
    for processes in (1, 2):
        shutil.rmtree(tiny_project.runs, ignore_errors=True)
        command = [sys.executable, "-m", "medgen", "train", "--set", f"compute.processes={processes}"]
        subprocess.run(command, cwd=tiny_project.root, check=True)
        (scratch,) = tiny_project.runs.glob("*/")
        losses.append([record["val/loss"] for record in history(scratch)])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.fixture
def gpu(request):
    if not torch.cuda.is_available():
        pytest.skip(f"{request.node.name}: no GPU, torch.cuda.is_available() is False")


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_gpu(gpu, tiny_project):
    """The host waits once every 20 steps, when it reads the guard's flag, and at the end of an epoch."""
    state = state_of(tiny_project, params("cuda"))
    state.task.num_batches = 40
    train_one_epoch(state)
    state.counters.step, state.task.num_batches = 0, 40
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits, Display(0, 1, False) as display:
            warnings.simplefilter("always")
            train_epoch(state, state.train.phases[0], display)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lines = sorted({f"{each.filename}:{each.lineno}" for each in waits})
    assert len(waits) <= 2 * 40 / state.guard.read_every + 2, lines
