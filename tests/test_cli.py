"""The command line: its commands and options, its errors, and its start without heavy imports."""

import errno
import json
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
import typer

from medgen import __version__, cli
from medgen.config import Model, Params, Prior, fingerprint, load
from medgen.errors import NonFiniteError, TrainingInterrupted, UserError

# Fixed on purpose: add an option only where `--set key=value` cannot do the same.
COMMANDS = {
    "init": {"--recipe", "--data"},
    "doctor": {"--params", "--set", "--json"},
    "code": set(),
    "preprocess": {"--params", "--set"},
    "features": {"--params", "--set"},
    "train": {"--params", "--set"},
    "prior": {"--params", "--set"},
    "refiner": {"--params", "--set"},
    "utility": {"--params", "--set"},
    "evaluate": {"--model", "--params", "--set"},
    "generate": {
        *("--out", "--n", "--label", "--seed", "--interpolate", "--traverse", "--refine", "--format", "--model"),
        *("--set-condition", "--params", "--set"),
    },
    "reconstruct": {"--out", "--label", "--format", "--uncertainty", "--model", "--params", "--set"},
    "anomaly": {"--out", "--label", "--model", "--params", "--set"},
    "counterfactual": {"--out", "--to", "--label", "--format", "--model", "--params", "--set"},
    "inpaint": {"--mask", "--out", "--label", "--format", "--model", "--params", "--set"},
    "export": {"--out", "--format", "--model", "--params", "--set"},
    "tune": {"--trials", "--workers", "--timeout", "--confirm", "--apply", "--params", "--set"},
    "compare": {"--json"},
    "register": {"--params", "--set"},
    "promote": {"--version", "--force", "--params", "--set"},
    "rollback": {"--why", "--params", "--set"},
    "history": {"--dataset", "--reproduce", "--run", "--json", "--params", "--set"},
    "serve": {"--model", "--host", "--port", "--follow", "--tokens", "--params", "--set"},
    "ui": {"--port", "--params", "--set"},
    "sync": {"--params", "--set"},
    "data sample": {"--params", "--set", "--seed", "--n"},
    "data import": {"--name", "--params", "--set"},
    "data audit": {"--params", "--set", "--json", "--out", "--strict"},
    "data verify": set(),
    "data list": set(),
    "data fetch": {"--params", "--set"},
    "weights list": set(),
    "weights fetch": set(),
    "weights verify": set(),
    "recipe list": set(),
    "recipe show": set(),
    "recipe use": set(),
    "recipe run": {"--set"},
}


def commands(group, prefix=""):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
            yield f"{prefix}{name}", options - {"--help"}


def test_the_commands_and_options_are_the_contract():
    assert dict(commands(typer.main.get_command(cli.app))) == COMMANDS


def test_every_command_is_in_the_contract_document(root):
    text = (root / "docs" / "contract.md").read_text()
    for name in COMMANDS:
        assert name.split()[-1] in text, name


def test_version_is_printed(medgen):
    assert medgen("--version") == (0, f"medgen {__version__}\n", "")


def test_every_command_and_argument_has_a_help_text():
    def check(command, name):
        assert (command.help or "").endswith("."), name
        for parameter in command.params:
            assert (parameter.help or "").endswith("."), (name, parameter.name)
        for child, sub in getattr(command, "commands", {}).items():
            check(sub, f"{name} {child}")

    group = typer.main.get_command(cli.app)
    group.params = [parameter for parameter in group.params if "completion" not in parameter.name]
    check(group, "medgen")


def test_help_imports_nothing_heavy():
    heavy = "('torch', 'mlflow', 'cv2', 'numpy', 'pydantic', 'sklearn', 'matplotlib', 'dvc', 'optuna')"
    code = f"import sys, medgen.cli; print([name for name in {heavy} if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.fixture
def medgen(tmp_path, monkeypatch, capsys):
    """Run the command line in an empty folder; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["medgen", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


NO_STORE = "artifacts/dataset"
MISTAKES = {  # arguments, text of params.yaml (None: no file), parts of the error message
    "no params": (["train"], None, ["params.yaml: not found", "--params FILE"]),
    "log file in a file": (["--log-file", "params.yaml/log", "train"], "{}", ["--log-file", "cannot be written"]),
    "not yaml": (["train"], "a: [1", ["params.yaml", "not readable as YAML"]),
    "not sections": (["train"], "- 1", ["params.yaml", "expected sections"]),
    "unknown section": (["train"], "tran: {}", ["tran", "did you mean 'train'"]),
    "unknown key": (["train"], "train: {batchsize: 3}", ["train.batchsize", "did you mean 'batch_size'"]),
    "deep unknown key": (
        ["train"], "train: {phases: {a: {epochs: 1, bta: {}}}}", ["train.phases.a.bta", "did you mean 'beta'"]
    ),
    "wrong type": (["train"], "train: {batch_size: many}", ["train.batch_size", "integer", "'many'"]),
    "wrong value": (["train"], "train: {ema_decay: 1.0}", ["train.ema_decay", "less than 1", "1.0"]),
    "twin phases": (
        ["train"], "train: {phases: [{name: a, epochs: 1}, {name: a, epochs: 1}]}", ["phase names must differ"]
    ),
    "set without =": (["train", "--set", "train.seed"], "{}", ["--set train.seed", "key=value"]),
    "set unknown": (["train", "--set", "train.sed=1"], "{}", ["train.sed", "did you mean 'seed'"]),
    "set through a value": (["train", "--set", "data.path.x=1"], "data: {path: d}", ["data.path", "not a section"]),
    "unknown phase": (
        ["train", "--set", "train.phases.7.epochs=1"], "train: {phases: {a: {epochs: 1}}}", ["7 is not", "one of a"]
    ),
    "phase without keys": (["train"], "train: {phases: {a: 3}}", ["train.phases.a", "found 3"]),
    "another family": (
        ["train"], "model: {name: vae, down: maxpool}", ["model.down is a key of autoencoder, unet", "remove it"]
    ),
    "no data": (["preprocess"], "{}", ["data"]),
    "no store for features": (["features"], "{}", [NO_STORE, "medgen preprocess"]),
    "no store for train": (["train"], "{}", [NO_STORE, "medgen preprocess"]),
    "no store for prior": (["prior"], "{}", [NO_STORE, "medgen preprocess"]),
    "no store for refiner": (["refiner"], "{}", [NO_STORE, "medgen preprocess"]),
    "no store for evaluate": (["evaluate"], "{}", [NO_STORE, "medgen preprocess"]),
    "unknown prior": (["prior"], "prior: {name: gm}", ["prior.name", "did you mean 'gmm'"]),
    "no model to generate": (["generate", "--out", "o"], "{}", ["artifacts/model", "dvc repro"]),
    "no model to traverse": (["generate", "--traverse", "--out", "o"], "{}", ["artifacts/model", "dvc repro"]),
    "a file to write into": (["generate", "--out", "params.yaml"], "{}", ["--out", "params.yaml", "is a file"]),
    "half a way": (["generate", "--out", "o", "--interpolate", "a.png"], "{}", ["--interpolate"]),
    "two things at once": (
        ["generate", "--traverse", "--interpolate", "a.png", "b.png", "--out", "o"], "{}", ["give one"]
    ),
    "no model to register": (["register"], "{}", ["model.json", "medgen train"]),
    "no tracking to register": (["register"], "tracking: {enabled: false}", ["tracking.enabled"]),
    "nothing to import": (["data", "import", "nowhere"], "{}", ["nowhere"]),
    "no store to verify": (["data", "verify"], None, [NO_STORE, "medgen preprocess"]),
    "unknown dataset": (["data", "fetch", "pneumoniamist"], "{}", ["pneumoniamist", "did you mean 'pneumoniamnist'"]),
    "dataset by hand": (["data", "fetch", "oasis1-volumes"], "{}", ["oasisbrains", "medgen data fetch"]),
    "unknown dataset to show": (["data", "list", "pneumoniamist"], None, ["did you mean 'pneumoniamnist'"]),
    "unknown recipe": (["recipe", "use", "chest-xray"], "{}", ["chest-xray", "Known:"]),
    "unknown recipe to run": (["recipe", "run", "unet"], None, ["recipe", "'unet'", "Known:"]),
    "unknown key to run": (
        ["recipe", "run", "chest-xray-64", "--set", "train.sed=1"], None, ["train.sed", "did you mean 'seed'"]
    ),
    "unknown weights": (["weights", "fetch", "vg16"], "{}", ["vg16", "did you mean 'vgg16'"]),
    "unknown recipe for a project": (["init", "p", "--recipe", "chest-xray"], None, ["chest-xray", "Known:"]),
    "a file as project": (["init", "params.yaml"], "{}", ["params.yaml", "is a file"]),
    "no such command": (["trian"], "{}", ["trian"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_message_and_exit_code_2(medgen, tmp_path, name, monkeypatch):
    monkeypatch.setenv("MEDGEN_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("MEDGEN_DATASETS", str(tmp_path / "datasets"))
    words, params, expected = MISTAKES[name]
    if params is not None:
        (tmp_path / "params.yaml").write_text(params)
    code, _, err = medgen(*words)
    assert code == 2
    assert "Traceback" not in err
    for word in expected:
        assert word in err, err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("a: b"), 2),
        (NonFiniteError("stopped", step=3, phase="a", term="kl", forensics=None), 4),
        (TrainingInterrupted("stopped"), 5),
    ],
)
def test_errors_become_exit_codes(monkeypatch, medgen, error, code):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli, "_call", fail)
    found, _, err = medgen("preprocess")
    assert found == code
    assert err == f"error: {error}\n"


def test_a_full_disk_is_one_message(monkeypatch, medgen):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "artifacts/model.building/model.safetensors")

    monkeypatch.setattr(cli, "_call", fail)
    found, _, err = medgen("preprocess")
    assert found == 2
    expected = r"error: artifacts/model\.building/model\.safetensors: cannot be written: No space left on device\. .*\n"
    assert re.fullmatch(expected, err)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "out of memory. "),
        (
            MemoryError("Unable to allocate 1.00 TiB for an array"),
            "out of memory: Unable to allocate 1.00 TiB for an array. ",
        ),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory: [Errno 12] Cannot allocate memory. "),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory"), "out of memory: [enforce] Default"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\n2 GiB"),
            "out of memory: CUDA out of memory. Tried 2 GiB",
        ),
    ],
)
def test_too_little_memory_is_one_message(monkeypatch, medgen, error, text):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli, "_call", fail)
    found, _, err = medgen("preprocess")
    assert found == 2
    assert err.startswith(f"error: {text}") and err.count("\n") == 1
    assert "Lower the batch size" in err


def test_a_defect_of_medgen_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "_call", lambda *_: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["medgen", "preprocess"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_set_overrides_reach_the_function(monkeypatch, tmp_path, medgen):
    seen = {}
    monkeypatch.setattr(
        "medgen.training.train.run", lambda project, *, train, model, fetch: seen.update(train=train, model=model)
    )
    (tmp_path / "params.yaml").write_text("train: {seed: 1, phases: {a: {epochs: 1, learning_rate: 1e-3}}}")
    code, _, _ = medgen("train", "--set", "train.seed=5", "--set", "train.phases.a.epochs=9", "--set", "model.name=x")
    assert code == 0
    assert seen["train"].seed == 5
    assert seen["train"].phases[0].epochs == 9
    assert seen["train"].phases[0].learning_rate == 1e-3  # YAML 1.2: a number, not the text "1e-3"
    assert seen["model"].name == "x"


def test_recipes_are_listed_shown_and_used(medgen, tmp_path, root):
    _, listing, _ = medgen("recipe", "list")
    for path in (root / "recipes").glob("*.yaml"):
        assert path.stem in listing
        assert medgen("recipe", "show", path.stem)[1] == path.read_text()
    (tmp_path / "params.yaml").write_text("data: {}")
    assert medgen("recipe", "use", "chest-xray-64")[0] == 0
    assert (tmp_path / "params.yaml").read_text() == (root / "recipes" / "chest-xray-64.yaml").read_text()
    assert (tmp_path / "params.yaml.before").read_text() == "data: {}"


def test_doctor_reports_json(medgen, tmp_path):
    (tmp_path / "params.yaml").write_text("{}")
    _, out, _ = medgen("doctor", "--json")
    assert {"torch"} <= {word for finding in json.loads(out) for word in json.dumps(finding).split('"')}


def test_a_folder_is_checked_before_there_is_a_project(medgen, tmp_path):
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), np.eye(16, dtype=np.uint8) * 255)
    code, _, error = medgen("data", "audit", "images", "--out", "page")
    assert (code, (tmp_path / "page" / "audit.html").is_file()) == (0, True), error
    code, _, error = medgen("data", "audit")
    assert code == 2 and "params.yaml: not found" in error


def test_sections_of_the_schema_are_the_contract():
    assert set(Params.model_fields) == {
        "data", "preprocess", "features", "model", "loss", "train", "prior", "refiner", "utility", "evaluate", "tune",
        "tracking", "registry", "compute",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("train: {phases: [{name: a, epochs: 3}]}", "train: {phases: {a: {epochs: 3}}}"),
        ("model: {name: vqvae, num_codes: 8}", "model: {name: vqvae, num_embeddings: 8}"),
        ("loss: {commitment: 1.0}", "loss: {commitment_cost: 1.0}"),
    ],
)
def test_keys_of_the_version_before_are_read_with_a_warning(tmp_path, capsys, old, new):
    files = []
    for name, text in (("old.yaml", old), ("new.yaml", new)):
        files.append(tmp_path / name)
        files[-1].write_text(text)
    params = load(files[0])
    assert "is now" in capsys.readouterr().err
    assert params == load(files[1])
    assert capsys.readouterr().err == ""


def test_a_phase_is_set_by_name_and_as_before_by_number(tmp_path, capsys):
    file = tmp_path / "params.yaml"
    file.write_text("train: {phases: {a: {epochs: 3}, b: {epochs: 4}}}")
    assert load(file, ["train.phases.b.epochs=7"]).train.phases[1].epochs == 7
    assert load(file, ["train.phases.1.epochs=7"]).train.phases[1].epochs == 7
    assert "phase 1 is now named b" in capsys.readouterr().err


def test_keys_of_other_families_change_no_fingerprint():
    changed = Model(name="spatial_vae", num_embeddings=9, down="strided")
    assert fingerprint(changed) == fingerprint(Model(name="spatial_vae"))
    assert fingerprint(Prior(name="gmm", channels=8)) == fingerprint(Prior(name="gmm"))
    assert fingerprint(Model(name="vqvae", num_embeddings=9)) != fingerprint(Model(name="vqvae"))
