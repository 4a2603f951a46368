"""A training that starts from weights: which ones, what fits, and the same result however often it is repeated."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from medgen.config import Loss, Model, Phase, Project, Tracking, Train, load
from medgen.errors import UserError
from medgen.models import MODELS, build_model, bundle
from medgen.tracking import history, read_run
from medgen.training import checkpoint, train
from medgen.training.initial_weights import PIN, load_weights
from medgen.training.loader import Loader

SMALL = Model(base_channels=8, latent_size=8, latent_channels=4)
PHASE = Phase(name="one", epochs=2, learning_rate=1e-3)
TRAIN = Train(batch_size=8, phases=(PHASE,), sample_every=9)
SHORT = {"phases": (PHASE.model_copy(update={"epochs": 1}),), "subset": 16}
WEIGHTS = "model.safetensors"


def run(project, train_params, model=SMALL, **options):
    return train.run(project, model=model, loss=Loss(), train=train_params, tracking=Tracking(enabled=False), **options)


@pytest.fixture(scope="module")
def sources(tiny_store, tmp_path_factory):
    """The folder of a project with a trained model in old/ and a random one in new/, and the record of the first."""
    project = Project(tmp_path_factory.mktemp("sources"))
    project.dataset.parent.mkdir()
    project.dataset.symlink_to(tiny_store)
    scratch = run(project, TRAIN)
    shutil.copytree(project.model, project.root / "old")
    info = bundle.load_info(project.model)
    bundle.save(project.root / "new", build_model(SMALL, info.image_shape, 3), info)
    return project.root, history(scratch)


@pytest.fixture
def registry(sources):
    """Fetches the version that an alias names at the time; `calls` are the URIs it was asked for."""
    root, _ = sources

    class Fake:
        def __init__(self):
            self.champion, self.calls = 3, []

        def __call__(self, uri):
            self.calls.append(uri)
            number = self.champion if "@" in uri else int(uri.rpartition("/")[2])
            return f"models:/m/{number}", root / {3: "old", 4: "new"}[number]

    return Fake()


def start(source, **update):
    return TRAIN.model_copy(update={"init_from": str(source), **update})


def test_training_starts_from_the_weights_of_a_folder_and_records_them(sources, tiny_project):
    """In half the epochs it is better than a start from random weights."""
    root, first = sources
    assert "init_from" not in json.loads((root / "old" / "model.json").read_text()), "described as before"
    scratch = run(tiny_project, start(root / "old", phases=SHORT["phases"], seed=7))
    assert history(scratch)[0]["val/ssim"] > first[1]["val/ssim"]
    source = f"{root / 'old'}{PIN}{bundle.digest(root / 'old')}"
    assert bundle.load_info(tiny_project.model).init_from == source
    assert json.loads((scratch / "params.json").read_text())["train"]["init_from"] == source
    tags = read_run(scratch).tags
    assert (tags["init_from"], tags["init_from.given"]) == (source, str(root / "old"))
    assert tags["init_from.not_taken"] == "none"


def test_every_tensor_is_taken(sources):
    model = build_model(SMALL, (1, 32, 32), 3)
    assert load_weights(model, "old", sources[0] / "old", strict=True) == []
    given = load_file(sources[0] / "old" / WEIGHTS)
    assert all(torch.equal(tensor, given[name]) for name, tensor in model.state_dict().items())


def test_a_moved_alias_does_not_change_what_the_recorded_parameters_rebuild(
    sources, tiny_project, registry, tiny_store, tmp_path, monkeypatch
):
    scratch = run(tiny_project, start("models:/m@champion", **SHORT), fetch=registry)
    made = {path.name: path.read_bytes() for path in tiny_project.model.iterdir()}
    recorded = Train.model_validate(json.loads((scratch / "params.json").read_text())["train"])
    assert recorded.init_from == f"models:/m/3{PIN}{bundle.digest(sources[0] / 'old')}"
    registry.champion = 4
    other = Project(tmp_path / "rebuilt")
    shutil.copytree(tiny_store, other.dataset)
    again = run(other, recorded, fetch=registry)
    assert again.name == scratch.name
    assert {path.name: path.read_bytes() for path in other.model.iterdir()} == made
    monkeypatch.setattr(train, "train_to_end", lambda state, *_: pytest.fail(state.scratch.name))
    with pytest.raises(pytest.fail.Exception) as moved:  # the alias itself now names another start
        run(tiny_project, start("models:/m@champion", **SHORT), fetch=registry)
    assert moved.value.msg != scratch.name


def test_a_resumed_run_keeps_its_start_though_the_alias_has_moved(tiny_project, registry, monkeypatch, capsys):
    batch = Loader.batch

    def stop(self, position):
        if position == 3:
            raise KeyboardInterrupt
        return batch(self, position)

    monkeypatch.setattr(Loader, "batch", stop)
    again = start("models:/m@champion", subset=16)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_project, again, fetch=registry)
    registry.champion, registry.calls = 4, []
    monkeypatch.setattr(Loader, "batch", batch)
    capsys.readouterr()
    scratch = run(tiny_project, again, fetch=registry)
    assert registry.calls == []
    assert "tensors start from" not in capsys.readouterr().out
    assert bundle.load_info(tiny_project.model).init_from.startswith("models:/m/3#")
    assert checkpoint.load(scratch)["counters"]["epoch"] == 2
    assert len(list(tiny_project.runs.glob("*/params.json"))) == 1


def test_a_model_of_other_sizes_is_refused_or_gives_the_layers_that_fit(sources, tiny_project, capsys):
    root, _ = sources
    wider = SMALL.model_copy(update={"latent_channels": 6})
    with pytest.raises(UserError, match=r"init_from.*do not fit: encoder.*\.weight \(\(8, 16, 3, 3\), here \(12, "):
        run(tiny_project, start(root / "old"), wider)
    capsys.readouterr()
    scratch = run(tiny_project, start(root / "old", init_strict=False, **SHORT), wider)
    left = read_run(scratch).tags["init_from.not_taken"]
    assert f"not taken: {left}\n" in capsys.readouterr().out
    names = re.findall(r"(\w+)\.[\w.]+ \(\(", left)
    assert names == ["encoder", "encoder", "decoder"]  # weight and bias of the last layer, weight of the first


def test_a_source_without_a_layer_that_fits_is_refused(sources):
    with pytest.raises(UserError, match=r"do not fit: weight \(not in the source\), bias.* and \d+ more; give section"):
        load_weights(torch.nn.Linear(2, 2), "old", sources[0] / "old", strict=False)


def test_weights_that_are_not_those_asked_for_are_refused(sources, tiny_project, tmp_path):
    root, _ = sources
    with pytest.raises(UserError, match=r"have the SHA-256 [0-9a-f]{64}, expected 0123"):
        run(tiny_project, start(f"{root / 'old'}{PIN}0123"))
    shutil.copytree(root / "old", tmp_path / "changed")
    content = bytearray((tmp_path / "changed" / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (tmp_path / "changed" / WEIGHTS).write_bytes(content)
    with pytest.raises(UserError, match="damaged: its SHA-256 differs"):
        run(tiny_project, start(tmp_path / "changed"))
    with pytest.raises(UserError, match=r"nothing.model\.json: not found"):
        run(tiny_project, start("nothing"))
    with pytest.raises(UserError, match=r"train\.init_from: artifacts/model is the folder that the training writes"):
        run(tiny_project, start("artifacts/model"))


@pytest.mark.parametrize("name", ["cvae", "vqvae"])
def test_a_frozen_encoder_gives_the_latents_of_its_source(name, tiny_project, tmp_path):
    """Also its BatchNorm statistics and codes stay, so priors and latents of the source fit; the decoder learns."""
    params = Model(name=name, base_channels=8, latent_channels=4)
    torch.manual_seed(0)
    source = build_model(params, (1, 32, 32), 3).eval()
    info = bundle.BundleInfo(params, load_preprocess(tiny_project), (1, 32, 32), ("a", "b", "c"), "d", "r", "2")
    bundle.save(tmp_path / "source", source, info)
    frozen = start(tmp_path / "source", freeze="encoder", ema_decay=0.9, **SHORT)
    run(tiny_project, frozen, params)
    model, _ = bundle.load(tiny_project.model)
    images, labels = torch.rand(4, 1, 32, 32), torch.arange(4) % 3
    assert torch.equal(model.encode(images, labels).mean, source.encode(images, labels).mean)
    latent = source.encode(images, labels).mean
    assert not torch.equal(model.decode(latent, labels), source.decode(latent, labels))


def load_preprocess(project):
    from medgen.data.store import open_store

    return open_store(project.dataset).preprocess


@pytest.mark.parametrize("name", MODELS)
def test_every_family_names_the_parts_of_its_encoder(name):
    model = build_model(Model(name=name, base_channels=8, latent_channels=4), (1, 32, 32), 3)
    assert all(isinstance(getattr(model, part), torch.nn.Module) for part in model.encoder_parts)


def test_random_weights_are_not_frozen(tmp_path):
    (tmp_path / "params.yaml").write_text("train: {freeze: encoder}")
    with pytest.raises(UserError, match="would keep random weights; set init_from too"):
        load(tmp_path / "params.yaml")
