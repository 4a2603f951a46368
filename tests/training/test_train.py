"""What a person is promised of a training: it survives kills, names what broke it, and is the same anywhere."""

import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file

from medgen.config import Beta, Loss, Model, Phase, Schedule, Tracking, Train, Weights, load
from medgen.data.store import open_store
from medgen.errors import NonFiniteError, TrainingInterrupted, UserError
from medgen.models import build_model, bundle
from medgen.models.spatial_vae import SpatialVAE
from medgen.tracking import history, read_run
from medgen.training import checkpoint, train
from medgen.training.distributed import StopRequest, World
from medgen.training.loader import Loader
from medgen.training.train import run_fingerprint

SMALL = Model(base_channels=8, latent_size=8, latent_channels=4)
OFF = Tracking(enabled=False)
PHASES = (
    Phase(name="reconstruct", epochs=2, learning_rate=1e-3, schedule=Schedule(name="cosine_restarts", period=1)),
    Phase(
        name="kl",
        epochs=2,
        learning_rate=5e-4,
        warmup_steps=3,
        schedule=Schedule(name="plateau", patience=1),
        beta=Beta(schedule="linear", end=0.01, epochs=2),
    ),
)
TRAIN = Train(batch_size=8, phases=PHASES, ema_decay=0.9, horizontal_flip=True, sample_every=2)


def run(project, train_params=TRAIN, model=SMALL, loss=Loss()):  # noqa: B008  # frozen
    return train.run(project, model=model, loss=loss, train=train_params, tracking=OFF)


@pytest.fixture(scope="module")
def finished(tiny_store, tmp_path_factory):
    """An uninterrupted run."""
    from medgen.config import Project

    project = Project(tmp_path_factory.mktemp("finished"))
    project.dataset.parent.mkdir()
    project.dataset.symlink_to(tiny_store)
    return project, run(project)


def test_leaves_a_bundle_curves_grids_and_a_record_of_every_epoch(finished):
    project, scratch = finished
    model, info = bundle.load(project.model)
    assert info.run == scratch.name
    assert info.classes == ("COVID19", "NORMAL", "PNEUMONIA")
    assert model.reconstruct(torch.rand(2, 1, 32, 32)).shape == (2, 1, 32, 32)
    for name in ("curves.csv", "loss.png", "ssim.png", "progress.gif"):
        assert (project.curves / name).stat().st_size > 0
    assert len(list((scratch / "samples").iterdir())) == 3  # epochs 1, 2 and 4
    assert Train.model_validate(json.loads((scratch / "params.json").read_text())["train"]) == TRAIN
    records = history(scratch)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert {"train/loss", "train/l1", "train/ssim_loss", "train/kl", "val/ssim", "train/beta_effective"} <= set(
        records[0]
    )
    assert records[-1]["val/ssim"] > records[0]["val/ssim"]


def test_phases_are_followed(finished):
    """What is recorded is what the epoch's last step used: a cosine at its end, not at the restart behind it."""
    project, scratch = finished
    last = 1 - 1 / (open_store(project.dataset).counts["train"] // TRAIN.batch_size)  # of an epoch, at its last step
    records = history(scratch)
    assert [record["train/beta"] for record in records] == pytest.approx([0, 0, 0.005 * last, 0.005 * (1 + last)])
    cosine = 0.01 + 0.99 * (1 + math.cos(math.pi * last)) / 2
    assert records[0]["train/learning_rate"] == pytest.approx(1e-3 * cosine)
    assert records[2]["train/learning_rate"] == pytest.approx(5e-4)


def test_validation_numbers_are_those_of_the_exported_model_over_the_whole_split(finished):
    """By a slow path: one image at a time, torchmetrics, the exported bundle."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    project, scratch = finished
    model, _ = bundle.load(project.model)
    images = torch.tensor(open_store(project.dataset).split("val").images[:]).float() / 255
    reconstructions = torch.cat([model.reconstruct(image[None]) for image in images]).detach()
    last = history(scratch)[-1]
    assert last["val/l1"] == pytest.approx((reconstructions - images).abs().mean().item(), rel=1e-4)
    _, full = ssim(reconstructions, images, data_range=1.0, return_full_image=True, reduction="none")
    # torchmetrics also counts windows that hang over the border, on reflected pixels: leave those out
    assert last["val/ssim"] == pytest.approx(full[..., 5:-5, 5:-5].mean().item(), abs=1e-4)


RAMP = Phase(
    name="ramp", epochs=4, learning_rate=2e-3, weights=Weights(mse=1.0), beta=Beta(schedule="linear", end=0.5, epochs=4)
)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_epoch_that_is_kept_is_the_best_by_the_objective_that_training_ends_with(tiny_project, keep):
    """While β rises the image terms alone are lowest in the epoch that is regularised least."""
    first = Phase(name="reconstruct", epochs=2, learning_rate=2e-3, beta=Beta(end=0.25))
    loss = Loss(weights=Weights(l1=1.0), free_bits=1.0)
    records = history(run(tiny_project, Train(batch_size=8, phases=(first, RAMP), keep=keep), loss=loss))
    model, _ = bundle.load(tiny_project.model)
    images = torch.tensor(open_store(tiny_project.dataset).split("val").images[:]).float() / 255
    with torch.no_grad():
        latent = model.encode(images)
        error = model.decode(latent.mean) - images

    def nats(batch):  # Kingma & Welling 2014, appendix B; of each channel at least free_bits
        mean, logvar = latent.mean[batch], latent.logvar[batch]
        kl = 0.5 * (mean**2 + logvar.exp() - logvar - 1)
        return sum(max(1.0, float(kl[:, c].sum((1, 2)).mean())) for c in range(kl.shape[1]))

    batches = torch.split(torch.arange(len(images)), 16)
    kl = sum(len(batch) * nats(batch) for batch in batches) / len(images)
    ours = float((error**2).mean()) + 0.5 * kl / (32 * 32)
    objectives, losses = ([record[f"val/{key}"] for record in records[2:]] for key in ("objective", "loss"))
    assert losses.index(min(losses)) < objectives.index(min(objectives))
    assert ours == pytest.approx(min(objectives) if keep == "best" else objectives[-1], rel=1e-4)
    assert records[-1]["val/loss"] < records[-1]["val/objective"]


@pytest.mark.parametrize("name", ["autoencoder", "vqvae"])
def test_without_kl_the_objective_is_the_loss_and_what_the_model_adds(tiny_project, name):
    model = SMALL.model_copy(update={"name": name, "num_embeddings": 16})
    loss = Loss(weights=Weights(l1=1.0), commitment_cost=3)
    phase = Phase(name="a", epochs=1, learning_rate=1e-3, beta=Beta(end=1.0))
    (record,) = history(run(tiny_project, Train(batch_size=8, phases=(phase,)), model, loss))
    trained, _ = bundle.load(tiny_project.model)
    added = 0.0
    if name == "vqvae":
        images = torch.tensor(open_store(tiny_project.dataset).split("val").images[:]).float() / 255
        with torch.no_grad():
            vectors = trained._encode_vectors(images)
        nearest = torch.cdist(vectors.movedim(1, -1).flatten(0, 2), trained.codebook).min(1).values
        added = 3 * float((nearest**2).sum()) / vectors.numel()
    assert record["val/objective"] - record["val/loss"] == pytest.approx(added, rel=1e-3, abs=0)


KILL = """
import os, signal, sys
from medgen.training.loader import Loader
from medgen import cli
batch, last = Loader.batch, int(sys.argv[1])
def deadly(self, position):
    if position == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(self, position)
Loader.batch = deadly
sys.argv = ["medgen", "train"]
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_seconds", [0, 3600], ids=["saved at every step", "saved at epoch ends"])
def test_a_killed_run_ends_bit_identical_to_an_uninterrupted_one(tiny_project, finished, checkpoint_seconds):
    params = {
        "model": SMALL.model_dump(mode="json"),
        "train": TRAIN.model_copy(update={"checkpoint_seconds": checkpoint_seconds}).model_dump(mode="json"),
        "tracking": {"enabled": False},
    }
    (tiny_project.root / "params.yaml").write_text(json.dumps(params))
    num_batches = open_store(tiny_project.dataset).counts["train"] // TRAIN.batch_size
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for position in (2 * num_batches + 2, 3 * num_batches + 1):  # mid-epoch, twice
        command = [sys.executable, "-c", KILL, str(position)]
        killed = subprocess.run(command, cwd=tiny_project.root, env=environment, capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not tiny_project.model.exists()
    command = [sys.executable, "-m", "medgen", "train"]
    subprocess.run(command, cwd=tiny_project.root, env=environment, check=True, capture_output=True)

    reference, scratch = finished
    assert (tiny_project.model / "model.safetensors").read_bytes() == (
        reference.model / "model.safetensors"
    ).read_bytes()
    assert (tiny_project.curves / "curves.csv").read_bytes() == (reference.curves / "curves.csv").read_bytes()
    assert strip(history(tiny_project.runs / scratch.name)) == strip(history(scratch))


def test_a_power_cut_loses_no_record_of_an_epoch_that_the_checkpoint_holds(tiny_project, monkeypatch):
    """A power cut loses all since the last flush, and the resumed training records only later epochs."""
    flushed, lost = {}, []
    fsync, save = os.fsync, checkpoint.save

    def flush(descriptor):
        fsync(descriptor)
        status = os.fstat(descriptor)
        flushed[status.st_ino] = status.st_size

    def check(scratch, state):
        record = (scratch / "history.jsonl").read_bytes()[: flushed.get((scratch / "history.jsonl").stat().st_ino, 0)]
        steps = {event["step"] for event in map(json.loads, record.splitlines()) if event["kind"] == "metrics"}
        lost.extend(set(range(1, state["counters"]["epoch"] + 1)) - steps)
        save(scratch, state)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(checkpoint, "save", check)
    run(tiny_project)
    assert flushed and not lost


def test_no_other_training_writes_between_the_model_and_its_report(tiny_project, monkeypatch):
    write_report, locked = train.write_report, []

    def check(*arguments):
        try:
            FileLock(tiny_project.model.with_name("model.lock"), timeout=0).acquire()
        except Timeout:
            locked.append((tiny_project.model / "model.json").exists())
        return write_report(*arguments)

    monkeypatch.setattr(train, "write_report", check)
    run(tiny_project)
    assert locked == [True]


@pytest.fixture
def ctrl_c():
    """Ctrl-C as at a terminal: a job in a shell's background ignores it, and so would these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_training_asked_to_stop_saves_its_last_step_and_ends_as_if_it_had_not_been(
    tiny_project, finished, monkeypatch, ctrl_c
):
    """By a cluster at an epoch's last step, by Ctrl-C in the middle of one; tests/test_slurm.py sends SIGUSR1."""
    reference, scratch = finished
    last_of_epoch = open_store(tiny_project.dataset).counts["train"] // TRAIN.batch_size - 1
    asked = {last_of_epoch: signal.SIGTERM, 2 * last_of_epoch: signal.SIGINT}
    before = [signal.getsignal(number) for number in asked.values()]
    batch = Loader.batch

    def asking(self, position):
        if position in asked:
            os.kill(os.getpid(), asked[position])
        return batch(self, position)

    monkeypatch.setattr(Loader, "batch", asking)
    for position, error in zip(asked, (TrainingInterrupted, KeyboardInterrupt), strict=True):
        with pytest.raises(error):
            run(tiny_project)
        assert checkpoint.load(tiny_project.runs / scratch.name)["counters"]["position"] == position + 1
        assert not tiny_project.model.exists()
    assert read_run(tiny_project.runs / scratch.name).status == "KILLED"
    assert [signal.getsignal(number) for number in asked.values()] == before
    run(tiny_project)
    for name in ("artifacts/model/model.safetensors", "reports/training/curves.csv"):
        assert (tiny_project.root / name).read_bytes() == (reference.root / name).read_bytes(), name


def test_a_second_ctrl_c_does_not_wait_for_the_step(ctrl_c):
    with StopRequest().listening():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def strip(records):
    return [{name: value for name, value in record.items() if not name.startswith("run/")} for record in records]


def test_the_same_command_again_trains_nothing(finished, monkeypatch):
    project, _ = finished
    before = (project.model / "model.safetensors").read_bytes()
    monkeypatch.setattr(Loader, "batch", lambda *_: pytest.fail("a batch was read"))
    run(project)
    assert (project.model / "model.safetensors").read_bytes() == before


def test_a_longer_last_phase_resumes_and_a_changed_model_does_not(finished):
    store = "0" * 12
    longer = TRAIN.model_copy(update={"phases": (PHASES[0], PHASES[1].model_copy(update={"epochs": 9}))})
    faster = TRAIN.model_copy(update={"phases": (PHASES[0], PHASES[1].model_copy(update={"learning_rate": 1.0}))})
    name = run_fingerprint(store, SMALL, Loss(), TRAIN)
    assert run_fingerprint(store, SMALL, Loss(), longer) == name
    assert run_fingerprint(store, SMALL, Loss(), TRAIN.model_copy(update={"sample_every": 7, "device": "cpu"})) == name
    for other in (
        run_fingerprint("1" * 12, SMALL, Loss(), TRAIN),
        run_fingerprint(store, SMALL.model_copy(update={"base_channels": 16}), Loss(), TRAIN),
        run_fingerprint(store, SMALL, Loss(free_bits=0.1), TRAIN),
        run_fingerprint(store, SMALL, Loss(), faster),
    ):
        assert other != name


def test_a_batch_in_parts_gives_the_weights_of_the_whole_batch(tiny_project, monkeypatch):
    """Also its flips and posterior draws; each forward pass holds one part of it."""
    sizes, forward = [], SpatialVAE.forward
    monkeypatch.setattr(
        SpatialVAE, "forward", lambda self, image, *given: (sizes.append(len(image)), forward(self, image, *given))[1]
    )
    weights = {}
    for parts, size in {1: 8, 4: 2}.items():
        sizes.clear()
        run(tiny_project, TRAIN.model_copy(update={"accumulate_steps": parts, "phases": PHASES[1:]}))
        assert set(sizes) == {size}
        weights[parts] = load_file(tiny_project.model / "model.safetensors")
    for key, value in weights[1].items():
        torch.testing.assert_close(weights[4][key], value, rtol=1e-3, atol=1e-4)


def test_a_batch_that_parts_do_not_divide_is_refused(tiny_project):
    with pytest.raises(UserError, match=r"train\.accumulate_steps: 3; expected a multiple of 3"):
        run(tiny_project, TRAIN.model_copy(update={"accumulate_steps": 3}))


ALIKE = """
# after each epoch: weights, codebook, statistics and averages are the same in both processes
import sys
import torch
import torch.distributed as dist
from medgen import cli
from medgen.training import loop
finish = loop.finish_epoch
def compare(job, *rest):
    finish(job, *rest)
    for tensor in [*job.model.state_dict().values(), *job.average.average]:
        least, most = tensor.clone(), tensor.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        assert torch.equal(least, most), "processes differ"
loop.finish_epoch = compare
sys.argv = ["medgen", "train"]
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vqvae", "vae"])
def test_what_a_model_counts_of_its_batches_is_alike_in_all_processes(name, tiny_store, tmp_path):
    """A codebook's moving means, and BatchNorm's, which each process takes of its own share; and initial weights."""
    params = {
        "model": {"name": name, "base_channels": 4, "latent_channels": 4},
        "train": {"batch_size": 8, "ema_decay": 0.9, "phases": {"a": {"epochs": 1, "learning_rate": 1e-3}}},
        "tracking": {"enabled": False},
    }
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "dataset").symlink_to(tiny_store)
    if name == "vqvae":
        params["train"]["init_from"], store = "start", open_store(tiny_store)
        model, shape = Model.model_validate(params["model"]), store.image_shape
        info = bundle.BundleInfo(model, store.preprocess, shape, store.classes, store.fingerprint, "run", "2")
        bundle.save(tmp_path / "start", build_model(model, shape, 3), info)
    (tmp_path / "params.yaml").write_text(json.dumps(params))
    (tmp_path / "alike.py").write_text(ALIKE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, "alike.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def poison(monkeypatch):
    """Makes the batch at one position infinite."""

    def at(position, times=10**9):
        batch = Loader.batch
        left = [times]

        def poisoned(self, where):
            found = batch(self, where)
            if where == position and left[0] > 0:
                left[0] -= 1
                found.image[0, 0, 3, 3] = math.inf
            return found

        monkeypatch.setattr(Loader, "batch", poisoned)

    return at


def test_raise_stops_before_the_update_and_names_step_term_and_files(tiny_project, poison):
    poison(4)
    with pytest.raises(NonFiniteError) as error:
        run(tiny_project)
    assert error.value.exit_code == 4
    assert (error.value.step, error.value.phase) == (4, "reconstruct")
    report = json.loads(error.value.forensics.read_text())
    assert report["step"] == 4
    assert report["epoch"] == 2
    assert report["input"]["max"] == "inf"
    assert report["input"]["num_nonfinite"] == 1
    assert len(report["files"]) == 8
    assert all(re.search(r"\.(jpg|png)$", name) for name in report["files"])
    assert report["first_nonfinite"] in report["terms"]
    assert report["reproduced"] is True
    assert report["gradient_norm_per_module"]
    saved = checkpoint.load(error.value.forensics.parent)
    assert all(torch.isfinite(tensor).all() for tensor in saved["model"].values())
    assert not tiny_project.model.exists()


def test_rollback_goes_on_from_the_last_good_state_with_half_the_rate(tiny_project, poison):
    poison(4, times=2)  # once in training, once for the forensics
    scratch = run(tiny_project, TRAIN.model_copy(update={"on_nonfinite": "rollback"}))
    records = history(scratch)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[1]["train/learning_rate"] == pytest.approx(records[0]["train/learning_rate"] / 2)
    weights = load_file(tiny_project.model / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_rollback_at_the_start_of_a_phase_stays_in_that_phase(tiny_project, poison):
    """The checkpoint it goes back to was saved in the phase before."""
    short = PHASES[0].model_copy(update={"epochs": 1})
    num_batches = open_store(tiny_project.dataset).counts["train"] // TRAIN.batch_size
    poison(num_batches, times=2)
    scratch = run(tiny_project, TRAIN.model_copy(update={"on_nonfinite": "rollback", "phases": (short, PHASES[1])}))
    records = history(scratch)
    assert [record["step"] for record in records] == [1, 2, 3]
    last = 1 - 1 / num_batches
    assert [record["train/beta"] for record in records] == pytest.approx([0, 0.005 * last, 0.005 * (1 + last)])


def test_rollback_gives_up_after_its_last_try(tiny_project, poison):
    poison(4)
    params = TRAIN.model_copy(update={"on_nonfinite": "rollback", "max_rollbacks": 2})
    with pytest.raises(NonFiniteError) as error:
        run(tiny_project, params)
    saved = checkpoint.load(error.value.forensics.parent)
    assert saved["counters"]["num_rollbacks"] == 2
    assert saved["counters"]["rate_scale"] == 0.25


def raw_inputs(monkeypatch):
    """Images left at 0 to 255, as in the published failure."""
    encode = SpatialVAE.encode
    monkeypatch.setattr(SpatialVAE, "encode", lambda self, image, *given: encode(self, 255 * image, *given))


def system_a(monkeypatch):
    """Its network: no normalisation, exp(logvar) unbounded."""
    raw_inputs(monkeypatch)
    monkeypatch.setattr("medgen.models.spatial_vae.soft_bound", lambda value, bound: value.float())
    for module in ("medgen.models.residual", "medgen.nn.blocks"):
        monkeypatch.setattr(f"{module}.group_norm", lambda *_: torch.nn.Identity())


SYSTEM_A = Loss(weights=Weights(mse=1.0), kl_reduction="sum")


def system_a_train(**update):
    phase = Phase(name="a", epochs=6, learning_rate=0.05, beta=Beta(end=0.003), optimizer="adam", weight_decay=0.0)
    return Train(batch_size=8, phases=(phase,), clip_norm=1e9, **update)


def test_system_a_reaches_infinity_and_is_stopped_with_its_term_named(tiny_project, monkeypatch):
    system_a(monkeypatch)
    with pytest.raises(NonFiniteError) as error:
        run(tiny_project, system_a_train(), loss=SYSTEM_A)
    assert error.value.term in {"kl", "mse", "total", "gradient"}


def test_ours_ends_finite_on_the_same_data_and_rate(tiny_project, monkeypatch):
    raw_inputs(monkeypatch)
    scratch = run(tiny_project, system_a_train(), loss=SYSTEM_A)
    assert all(math.isfinite(value) for record in history(scratch) for value in record.values())


def test_a_run_that_went_further_than_asked_is_refused(tiny_project):
    two = PHASES[0].model_copy(update={"epochs": 2})
    run(tiny_project, TRAIN.model_copy(update={"phases": (two,)}))
    with pytest.raises(UserError, match="for 2 epochs, expected at most 1"):
        run(tiny_project, TRAIN.model_copy(update={"phases": (two.model_copy(update={"epochs": 1}),)}))


def test_a_longer_run_ends_as_if_it_had_been_asked_for_at_once(tiny_project, finished):
    reference, _ = finished
    shorter = TRAIN.model_copy(update={"phases": (PHASES[0], PHASES[1].model_copy(update={"epochs": 1}))})
    run(tiny_project, shorter)
    run(tiny_project)
    for name in ("reports/training/curves.csv", "reports/training/progress.gif", "artifacts/model/model.safetensors"):
        assert (tiny_project.root / name).read_bytes() == (reference.root / name).read_bytes(), name


def test_a_loss_for_masks_is_refused_for_pictures(tiny_project):
    with pytest.raises(UserError, match="dice compares masks"):
        run(tiny_project, loss=Loss(weights=Weights(l1=1.0, dice=0.1)))


def test_no_weight_at_all_is_refused(tmp_path):
    (tmp_path / "params.yaml").write_text("loss:\n  weights: {l1: 0}\n")
    with pytest.raises(UserError, match="no term has a weight"):
        load(tmp_path / "params.yaml")


def test_shares_of_processes_are_even_whatever_is_left_to_train_on(tiny_project):
    """A subset smaller than the batch shrinks it: three images for one process and two for the other are refused."""
    world = World(0, 2, torch.device("cpu"))
    with pytest.raises(UserError, match="5 images a step, of 5 training images, for 2 processes; expected a multiple"):
        train.ModelTask(tiny_project, world, SMALL, Loss(), TRAIN.model_copy(update={"subset": 5}))


def test_an_empty_val_split_is_refused_with_the_key_to_turn(tmp_path):
    from medgen.config import Data, Preprocess, Project
    from medgen.datasets.sample import draw
    from medgen.ingest import preprocess

    draw(tmp_path / "data", num_images=9, size=64, seed=0)
    project = Project(tmp_path)
    preprocess.run(project, data=Data(), preprocess=Preprocess(image_size=32, clahe_tiles=2, val_fraction=0.0))
    with pytest.raises(UserError, match=r"val split is empty.*preprocess\.val_fraction"):
        run(project)


@pytest.mark.parametrize("where", [0, 100, 0.5, -1])
def test_a_damaged_checkpoint_is_refused_by_name(tiny_project, finished, where):
    """One bit differs, at the start, in the header, in the weights or at the end."""
    scratch = tiny_project.runs / finished[1].name
    shutil.copytree(finished[1], scratch)
    content = bytearray((scratch / "checkpoint.pt").read_bytes())
    content[int(where * len(content)) if isinstance(where, float) else where] ^= 1
    (scratch / "checkpoint.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint\.pt: damaged checkpoint .* remove the file"):
        run(tiny_project)


@pytest.mark.parametrize(
    "damage", [lambda content: content[:100] + content[400:], lambda _: b"", lambda _: saved_list()]
)
def test_a_damaged_checkpoint_with_the_right_hash_is_refused(tmp_path, damage):
    checkpoint.save(tmp_path, {"counters": {}, "weights": torch.zeros(1000)})
    path = tmp_path / "checkpoint.pt"
    content = damage(path.read_bytes()[: -checkpoint.HASH_BYTES])
    path.write_bytes(content + hashlib.sha256(content).digest())
    with pytest.raises(UserError, match=r"checkpoint\.pt: damaged checkpoint .* remove the file"):
        checkpoint.load(tmp_path)


def saved_list():
    buffer = io.BytesIO()
    torch.save([1], buffer)
    return buffer.getvalue()


def test_the_checkpoint_of_another_run_is_refused(tiny_project, finished):
    scratch = tiny_project.runs / finished[1].name
    scratch.mkdir(parents=True)
    checkpoint.save(tiny_project.runs / "0123456789ab", {"counters": {}})
    shutil.copy(tiny_project.runs / "0123456789ab" / "checkpoint.pt", scratch)
    with pytest.raises(UserError, match=rf"the checkpoint of run 0123456789ab; expected one of {scratch.name}"):
        run(tiny_project)


def test_perceptual_weight_without_weights_says_how_to_get_them(tiny_project, monkeypatch, tmp_path):
    monkeypatch.setenv("MEDGEN_WEIGHTS", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="medgen weights fetch vgg16"):
        run(tiny_project, loss=Loss(weights=Weights(l1=1.0, perceptual=0.1)))


def test_the_description_of_a_run_shows_names_from_the_data_literally(tiny_project):
    label = "![x](http://127.0.0.1:9/pixel.png)\n# <b>"
    task = train.ModelTask.__new__(train.ModelTask)  # describe needs no network
    task.params, task.train, task.model, task.mask_classes = Model(), Train(), None, 2
    task.store = replace(open_store(tiny_project.dataset), classes=(label, "PNEUMONIA"), name="[a](b)")
    described = task.describe()
    assert not set("\n![]<>") & set(described)
    assert "PNEUMONIA" in described
