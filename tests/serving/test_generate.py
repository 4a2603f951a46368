"""`medgen generate` and `medgen reconstruct`: written images, seeds, labels, interpolation, axes and errors."""

import csv
import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from medgen.config import Model, Preprocess, Prior, Project, Refiner
from medgen.errors import UserError
from medgen.ingest.images import read_image
from medgen.ingest.transforms import preprocess_image
from medgen.models import build_model, bundle
from medgen.models.base import Latent
from medgen.models.bundle import BundleInfo
from medgen.priors import ANALYTIC, save_prior
from medgen.priors import refiner as refinement
from medgen.priors.refiner import save_disabled, save_refiner
from medgen.serving import generate

MODEL = Model(base_channels=8, max_channels=16, latent_channels=4, latent_size=4, attention_resolutions=())
CLASSES = ("COVID19", "NORMAL", "PNEU/../MONIA")
INFO = BundleInfo(
    model=MODEL,
    preprocess=Preprocess(image_size=32, clahe_tiles=2),
    image_shape=(1, 32, 32),
    classes=CLASSES,
    dataset="d" * 12,
    run="r" * 12,
    torch=torch.__version__,
)


def build(root, prior="gmm", classes=CLASSES):
    """A project with an untrained model and a prior with well separated classes."""
    project = Project(root)
    torch.manual_seed(0)
    bundle.save(
        project.model, build_model(MODEL, (1, 32, 32), len(classes)), dataclasses.replace(INFO, classes=classes)
    )
    labels = torch.arange(180) % 2 * 2 if classes else torch.full((180,), -1)  # no image of class 1
    latents = torch.randn(180, 4, 4, 4) + 5.0 * labels[:, None, None, None]
    fitted = ANALYTIC[prior].fit(latents, labels, len(classes), Prior(components=(1,)))
    save_prior(project.prior, fitted, bundle.digest(project.model))
    save_disabled(project.refiner, bundle.digest(project.model))
    return project


def add_refiner(project):
    """Add an untrained refiner, which adds noise of scale 0.1."""
    params = Refiner(enabled=True, channels=8, blocks=1, sampling_steps=2)
    scales = torch.full((1,), 0.1), torch.ones(1, 32, 17), torch.ones(4, 4, 4)
    refiner = refinement.Refiner.create(params, (1, 32, 32), len(CLASSES), *scales)
    save_refiner(project.refiner, refiner, bundle.digest(project.model))


@pytest.fixture
def project(tmp_path):
    return build(tmp_path)


def pixels(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def test_images_and_grid_are_written(project, tmp_path):
    paths = generate.run(project.model.parent, tmp_path / "new", n=130)
    found = pixels(tmp_path / "new")
    assert len(paths) == 130
    assert {path.name for path in paths} | {"grid.png"} == set(found)
    assert {found[path.name].shape for path in paths} == {(32, 32)}
    assert {path.name.rsplit("_", 1)[0] for path in paths} == {"COVID19", "PNEU_.._MONIA"}


def test_same_seed_gives_the_same_images(project, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate.run(project.model.parent, tmp_path / name, n=5, label="COVID19", seed=seed)
    a, b, c = (pixels(tmp_path / name) for name in "abc")
    assert all((a[name] == b[name]).all() for name in a)
    assert any((a[name] != c[name]).any() for name in a)


def test_a_second_call_leaves_no_image_of_the_first_and_loses_none_of_the_user(project, tmp_path):
    out = tmp_path / "new"
    generate.run(project.model.parent, out, n=9, label="COVID19")
    paths = generate.run(project.model.parent, out, n=2, label="2")
    assert set(pixels(out)) == {"grid.png", *(path.name for path in paths)}
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(out / "mine.png")
    before = pixels(out)
    calls = [
        lambda: generate.run(project.model.parent, out, n=2),
        lambda: generate.traverse(project.model.parent, out, n=2),
        lambda: generate.interpolate(project.model.parent, out, ends=(paths[0], paths[1]), n=2),
        lambda: generate.reconstruct(project.model.parent, out, files=paths),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"--out .*mine\.png"):
            call()
    assert set(pixels(out)) == set(before)


def test_a_folder_below_a_file_is_an_error(project, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*cannot be written"):
        generate.run(project.model.parent, tmp_path / "file" / "new", n=2)


@pytest.mark.parametrize(("label", "name"), [("COVID19", "COVID19"), ("0", "COVID19"), ("2", "PNEU_.._MONIA")])
def test_label_by_name_or_index(project, tmp_path, label, name):
    paths = generate.run(project.model.parent, tmp_path / "new", n=3, label=label)
    assert [path.name for path in paths] == [f"{name}_{i:05d}.png" for i in range(3)]


def test_model_from_another_folder(project, tmp_path):
    place = tmp_path / "elsewhere"
    shutil.move(project.root / "artifacts", place)
    assert generate.run(place, tmp_path / "new", n=2)
    with pytest.raises(UserError, match="medgen train"):
        generate.run(project.model.parent, tmp_path / "new", n=2)


@pytest.mark.parametrize(
    ("changes", "label", "message"),
    [
        ({}, "COVID", "did you mean 'COVID19'.*Known: COVID19, NORMAL"),
        ({}, "3", "Known: COVID19"),
        ({}, "²", "Known: COVID19"),
        ({}, "NORMAL", "no image of 'NORMAL'"),
        ({"prior": "gaussian"}, "COVID19", "neither prior 'gaussian' nor the model is conditional"),
        ({"classes": ()}, "COVID19", "without labels"),
    ],
)
def test_invalid_label_is_an_error(tmp_path, changes, label, message):
    project = build(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        generate.run(project.model.parent, tmp_path / "new", n=2, label=label)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("changes", [{"classes": ()}, {"prior": "normal"}, {"prior": "gaussian"}])
def test_images_without_a_class_are_named_image(tmp_path, changes):
    paths = generate.run(build(tmp_path, **changes).model.parent, tmp_path / "new", n=2)
    assert [path.name for path in paths] == ["image_00000.png", "image_00001.png"]


@pytest.mark.parametrize("part", ["prior", "refiner"])
def test_missing_part_is_named(project, tmp_path, part):
    shutil.rmtree(project.root / "artifacts" / part)
    with pytest.raises(UserError, match=f"run `medgen {part}`"):
        generate.run(project.model.parent, tmp_path / "new", n=2)


def test_images_are_refined_unless_disabled(project, tmp_path):
    def new(name, **options):
        generate.run(project.model.parent, tmp_path / name, n=5, seed=1, **options)
        return pixels(tmp_path / name)

    decoded = new("decoded")
    add_refiner(project)
    refined, again, plain = new("refined"), new("again"), new("plain", refine=False)
    assert set(refined) == set(decoded), "the same classes"
    assert all((refined[name] == again[name]).all() for name in refined)
    assert all((plain[name] == decoded[name]).all() for name in decoded)
    assert all((refined[name] != decoded[name]).any() for name in decoded)


@pytest.fixture
def files(tmp_path):
    """Two images with the same name, and a file that is not an image."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / "a" / "chest.png", tmp_path / "b" / "chest.png"]
    for path, (height, width) in zip(paths, [(90, 60), (40, 50)], strict=True):
        path.parent.mkdir()
        Image.fromarray(rng.integers(0, 255, (height, width), dtype=np.uint8)).save(path)
    (tmp_path / "note.png").write_text("not an image")
    return paths, tmp_path / "note.png"


def test_reconstructions_are_written_with_their_scores(project, files, tmp_path):
    paths, _ = files
    rows = generate.reconstruct(project.model.parent, tmp_path / "out", files=paths)
    assert [row["image"] for row in rows] == ["chest.png", "chest_2.png"]
    assert all((tmp_path / "out" / row["image"]).exists() for row in rows)
    with (tmp_path / "out" / "reconstructions.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == rows
    model, info = bundle.load(project.model)
    pixels = preprocess_image(read_image(paths[0], info.preprocess).pixels, info.preprocess)
    original = torch.from_numpy(pixels)[None] / 255.0
    with torch.no_grad():
        error = ((model.reconstruct(original) - original) ** 2).mean().item()
    assert float(rows[0]["psnr"]) == pytest.approx(-10 * np.log10(error), abs=0.01)
    assert -1 <= float(rows[0]["ssim"]) <= 1


@pytest.mark.parametrize(("label", "expected"), [(None, [0, 1]), ("2", [2, 2]), ("NORMAL", [1, 1])])
def test_conditional_model_reconstructs_with_the_given_label_or_the_folders_class(tmp_path, label, expected):
    project, model, _ = build_flat(tmp_path, CVAE)
    paths = two_images(tmp_path)
    rows = generate.reconstruct(project.model.parent, tmp_path / "out", files=paths, label=label)
    for path, row, number in zip(paths, rows, expected, strict=True):
        original = generate.load_image(path, INFO.preprocess)
        with torch.no_grad():
            error = {k: ((model.reconstruct(original, torch.tensor([k])) - original) ** 2).mean() for k in range(3)}
        scores = {k: f"{-10 * float(value.log10()):.2f}" for k, value in error.items()}
        assert row["psnr"] == scores[number]
        assert scores[number] not in [scores[k] for k in scores if k != number], (
            "the scores must differ for this comparison"
        )


def test_unreadable_file_is_an_error_after_the_others_are_written(project, files, tmp_path):
    paths, broken = files
    with pytest.raises(UserError, match=r"note\.png"):
        generate.reconstruct(project.model.parent, tmp_path / "out", files=[broken, paths[0]])
    assert (tmp_path / "out" / "chest.png").exists()


CVAE = Model(name="cvae", base_channels=4, latent_channels=6)
VAE = CVAE.model_copy(update={"name": "vae"})


def build_flat(root, sizes, prior="gaussian"):
    """A project with an untrained model with vector latents, and a prior fitted to random latents."""
    project = Project(root)
    torch.manual_seed(0)
    model = build_model(sizes, (1, 32, 32), 3).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # with the default initialization all latents give nearly the same image
    bundle.save(project.model, model, dataclasses.replace(INFO, model=sizes))
    latents = torch.randn(90, 6) * torch.tensor([0.1, 3.0, 0.5, 1.0, 0.2, 2.0]) + 1.0
    fitted = ANALYTIC[prior].fit(latents, torch.arange(90) % 3, 3, Prior(components=(1,)))
    save_prior(project.prior, fitted, bundle.digest(project.model))
    return project, model, latents


def two_images(folder):
    rng = np.random.default_rng(0)
    paths = [folder / "COVID19" / "a.png", folder / "NORMAL" / "new" / "b.png"]
    for path in paths:
        path.parent.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8)).save(path)
    return paths


def num_frames(path):
    with Image.open(path) as animation:
        return animation.n_frames


@pytest.mark.parametrize("sizes", [MODEL, VAE], ids=["grid", "vector"])
def test_interpolation_starts_and_ends_at_the_reconstructions(tmp_path, sizes):
    project = build(tmp_path) if sizes is MODEL else build_flat(tmp_path, sizes)[0]
    ends, out = two_images(tmp_path), tmp_path / "path"
    images = generate.interpolate(project.model.parent, out, ends=tuple(ends), n=5)
    model, info = bundle.load(project.model)
    with torch.no_grad():
        rebuilt = [model.reconstruct(generate.load_image(end, info.preprocess)) for end in ends]
    # the rounding of convolutions depends on the batch size
    torch.testing.assert_close(images[:1], rebuilt[0], atol=3e-4, rtol=0)
    torch.testing.assert_close(images[-1:], rebuilt[1], atol=3e-4, rtol=0)
    assert min((images[2] - images[i]).abs().max() for i in (0, 4)) > 3e-3
    assert set(pixels(out)) == {"interpolation.png", *(f"path_{i:05d}.png" for i in range(5))}
    assert num_frames(out / "interpolation.gif") == 5


def test_spherical_and_linear_interpolation():
    first, second, weights = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0]), torch.linspace(0, 1, 5)
    arc = generate.slerp(first, second, weights)
    torch.testing.assert_close(arc.norm(dim=1), torch.full((5,), 2.0))
    torch.testing.assert_close(torch.atan2(arc[:, 1], arc[:, 0]), weights * torch.pi / 2)
    torch.testing.assert_close(generate.lerp(first, second, weights)[2], torch.tensor([1.0, 1.0]))
    for second in (3 * first, -first, torch.zeros(2)):  # directions without a unique arc
        points = generate.slerp(first, second, weights)
        assert torch.isfinite(points).all()
        torch.testing.assert_close(points[-1], second, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("label", "expected"), [(None, [0, 0, 0, 1, 1]), ("2", [2] * 5)])
def test_interpolation_with_a_conditional_model_uses_the_given_label_or_the_folders_classes(
    tmp_path, monkeypatch, label, expected
):
    project, model, _ = build_flat(tmp_path, CVAE)
    given = {}
    zeros = Latent(value=torch.zeros(2, 6), mean=torch.zeros(2, 6))
    monkeypatch.setattr(type(model), "encode", lambda self, image, labels: given.update(encode=labels) or zeros)
    monkeypatch.setattr(
        type(model), "decode", lambda self, z, labels: given.update(decode=labels) or torch.zeros(len(z), 1, 32, 32)
    )
    ends = tuple(two_images(tmp_path))
    generate.interpolate(project.model.parent, tmp_path / "path", ends=ends, n=5, label=label)
    assert given["encode"].tolist() == [expected[0], expected[-1]]
    assert given["decode"].tolist() == expected


def test_traversal_follows_the_principal_axes_from_the_mean_latent(tmp_path):
    """Compared with a singular value decomposition of the latents that the prior was fitted to."""
    project, model, latents = build_flat(tmp_path, VAE)
    images = generate.traverse(project.model.parent, tmp_path / "axes", n=7)
    assert images.shape == (6, 7, 1, 32, 32)
    assert (images[:3, 0] - images[:3, -1]).abs().amax(dim=(1, 2, 3)).min() > 0.1, (
        "the scores must differ for this comparison"
    )
    _, values, directions = torch.linalg.svd(latents - latents.mean(0), full_matrices=False)
    deviations = values / (len(latents) - 1) ** 0.5
    with torch.no_grad():
        torch.testing.assert_close(images[4, 3], model.decode(latents.mean(0)[None])[0], atol=1e-4, rtol=0)
        for axis in range(6):
            ends = [latents.mean(0) + sign * 3 * deviations[axis] * directions[axis] for sign in (-1, 1)]
            wanted = model.decode(torch.stack(ends))
            found = images[axis, [0, -1]]
            error = min(
                (found - wanted).abs().max(), (found - wanted.flip(0)).abs().max()
            )  # the sign of an axis is arbitrary
            assert error < 1e-4, axis
    assert set(pixels(tmp_path / "axes")) == {"traversal.png"}
    assert num_frames(tmp_path / "axes" / "traversal.gif") == 13  # forward and backward


@pytest.mark.parametrize(
    ("sizes", "prior", "call", "options", "message"),
    [
        (CVAE, "gaussian", "traverse", {}, "cvae needs one; expected one of COVID19"),
        (CVAE, "gaussian", "traverse", {"label": "NORMA"}, "did you mean 'NORMAL'"),
        (VAE, "gaussian", "traverse", {"label": "NORMAL"}, "vae does not use labels"),
        (VAE, "normal", "traverse", {}, "has no axes.*prior.name=gmm"),
        (CVAE, "gaussian", "traverse", {"label": "²"}, "unknown name '²'"),
        (VAE, "gaussian", "traverse", {"n": 1}, "--n: found 1, expected 2 to 200"),
        (VAE, "gaussian", "traverse", {"n": 201}, "--n: found 201, expected 2 to 200"),
        (VAE, "gaussian", "interpolate", {"n": 1}, "--n: found 1, expected 2 to 200"),
        (VAE, "gaussian", "interpolate", {"n": 201}, "--n: found 201, expected 2 to 200"),
        (VAE, "gaussian", "interpolate", {"ends": 2}, r"--interpolate: \S*note\.png: not readable"),
        (VAE, "gaussian", "interpolate", {"ends": 3}, r"--interpolate: \S*broken\.npy: not readable"),
        (CVAE, "gaussian", "reconstruct", {}, r"no folder of \S*c\.png has the name of a class.*Known"),
        (VAE, "gaussian", "reconstruct", {"label": "NORMAL"}, "vae does not use labels"),
        (CVAE, "gaussian", "interpolate", {"ends": 1}, r"no folder of \S*c\.png has the name of a class.*Known"),
    ],
)
def test_invalid_input_is_an_error(tmp_path, sizes, prior, call, options, message):
    project, _, _ = build_flat(tmp_path, sizes, prior)
    (tmp_path / "note.png").write_text("not an image")
    shutil.copy(two_images(tmp_path)[0], tmp_path / "c.png")
    (tmp_path / "broken.npy").write_bytes(b"not an array")
    readable = tmp_path / "c.png"
    others = {1: (readable,) * 2, 2: (readable, tmp_path / "note.png"), 3: (tmp_path / "broken.npy", readable)}
    options = ({"files": [readable]} if call == "reconstruct" else {"n": 3}) | options
    if call == "interpolate":
        options["ends"] = others[options.get("ends", 1)]
    with pytest.raises(UserError, match=message):
        getattr(generate, call)(project.model.parent, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
