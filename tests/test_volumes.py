"""A project of NIfTI volumes passes all stages: 3-D model and refiner, planes for metrics of sets, NIfTI out."""

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

import medgen
from medgen.config import (
    Augment,
    Beta,
    Condition,
    Data,
    Evaluate,
    Features,
    Loss,
    Model,
    Phase,
    Preprocess,
    Prior,
    Project,
    Refiner,
    Tracking,
    Train,
    Utility,
    Weights,
)
from medgen.data.images import to_floats
from medgen.data.store import open_store
from medgen.errors import UserError
from medgen.evaluation import conditions, evaluate, utility
from medgen.ingest import preprocess
from medgen.models import build_model, bundle
from medgen.priors import ANALYTIC, load_prior, save_prior
from medgen.priors.refiner import load_refiner, save_disabled
from medgen.serving import generate, pyfunc, uses
from medgen.tracking import history
from medgen.training import extractor, prior, refiner, train

SIDE = 32
SIZES = Preprocess(image_size=(SIDE, SIDE, SIDE), clahe_clip=0.0, val_fraction=0.2, test_fraction=0.3)
REFINER = Refiner(enabled=True, channels=8, blocks=1, epochs=2, batch_size=4, sampling_steps=2)
PHASE = Phase(name="train", epochs=2, learning_rate=3e-3, beta=Beta(end=0.1))
OFF = Tracking(enabled=False)
Draw = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, draw_volumes: Draw) -> Project:
    """A VAE of volumes after the stages from preprocess to refiner."""
    project = Project(tmp_path_factory.mktemp("volumes"))
    draw_volumes(project.root / "data", 60)
    preprocess.run(project, data=Data(), preprocess=SIZES)
    extractor.run(project, features=Features(width=4, epochs=1))
    model = Model(name="vae", dims=3, base_channels=4, max_channels=8, latent_channels=4)
    loss = Loss(weights=Weights(l1=1.0, ssim=0.2))
    train.run(project, model=model, loss=loss, train=Train(batch_size=8, phases=(PHASE,)), tracking=OFF)
    prior.run(project, prior=Prior(name="gmm", components=(1,)), tracking=OFF)
    refiner.run(project, refiner=REFINER, tracking=OFF)
    return project


def test_keys_of_volumes_are_left_out_of_dumps_at_their_defaults() -> None:
    """Stores, models and runs of images keep their bytes and fingerprints."""
    assert "voxel_size" not in SIZES.model_dump()
    with pytest.raises(ValidationError, match="voxel_size is of volumes"):
        Preprocess(voxel_size=(1.0, 1.0, 1.0))
    assert "dims" not in Model().model_dump() and "patch" not in Train().model_dump()
    assert Model(dims=3).model_dump()["dims"] == 3
    assert Train(patch=(8, 8)).model_dump(mode="json")["patch"] == [8, 8]


def test_a_store_of_volumes_is_read_back(trained: Project) -> None:
    store = open_store(trained.dataset)
    assert store.image_shape == (1, SIDE, SIDE, SIDE) and store.classes == ("ball", "box")
    split = store.split("train")
    assert split.images.shape == (store.counts["train"], 1, SIDE, SIDE, SIDE)
    volume = split.images[0, 0]
    share = np.mean(volume > 128)  # a ball of radius 6 or a box of side 10, in voxels of 1.2 x 1.0 x 1.1 mm
    expected = 900 * 1.2 * 1.0 * 1.1 / 24.2**3
    assert 0.7 < share / expected < 1.4
    with pytest.raises(UserError, match=r"model\.dims: 2, but the dataset has items of 32 x 32 x 32"):
        train.run(trained, model=Model(name="vae"), loss=Loss(), train=Train(), tracking=OFF)
    loss = Loss(weights=Weights(l1=1.0, perceptual=0.1))
    with pytest.raises(UserError, match=r"loss\.weights: perceptual"):
        train.run(trained, model=Model(name="vae", dims=3), loss=loss, train=Train(), tracking=OFF)


def test_the_model_learns(trained: Project) -> None:
    model, info = bundle.load_generative(trained.model)
    assert info.model.dims == 3 and model.latent_shape == (4,)
    first, last = history(trained.runs / info.run)
    assert last["val/loss"] < first["val/loss"]
    with Image.open(trained.runs / info.run / "reconstructions" / "epoch_0002.png") as image:
        assert image.width > 3 * 96  # three planes side by side, enlarged


def test_the_gain_of_a_refiner_is_of_the_power_in_three_dimensions(
    trained: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model, info), store = bundle.load_generative(trained.model), open_store(trained.dataset)
    made = load_refiner(trained.refiner, bundle.digest(trained.model))
    assert made is not None and made.image_shape == (1, SIDE, SIDE, SIDE)
    (scratch,) = (trained.runs / info.run).glob("refiner_*")
    assert (scratch / "samples" / "epoch_0002.png").exists()
    volumes = to_floats(torch.from_numpy(store.split("train").images[:]))
    mean = volumes.mean((2, 3, 4), keepdim=True)
    monkeypatch.setattr(refiner, "sample_images", lambda *_: mean + 0.9 * (volumes - mean))
    found = refiner.fit_gain(made, model, load_prior(trained.prior, bundle.digest(trained.model)), store)
    assert found[0, 0, 0] == 1.0, "the mean stays"
    found[0, 0, 0] = 1 / 0.9
    torch.testing.assert_close(found, torch.full((SIDE, SIDE, SIDE // 2 + 1), 1 / 0.9))


def test_a_volume_that_is_too_large_to_refine_is_refused(trained: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refiner, "MAX_VOXELS", SIDE**3 - 1)
    with pytest.raises(UserError, match=r"refiner\.enabled: true, .*volumes of 32 x 32 x 32.*at most 32,767 voxels"):
        refiner.run(trained, refiner=REFINER, tracking=OFF)


@pytest.mark.slow
def test_evaluation_and_utility_of_volumes(trained: Project) -> None:
    settings = Utility(enabled=True, fractions=(0.5,), repetitions=2, steps=3, num_generated=16)
    assert utility.run(trained, features=Features(width=4, batch_size=8), utility=settings) is not None
    found = evaluate.run(trained, evaluate=Evaluate(num_generated=24, grid_images=4, save_images=True), tracking=OFF)
    assert found is not None
    assert {"reconstruction/ssim", "reconstruction/psnr", "reconstruction/pca_ssim", "generation/mmd_domain",
            "generation/c2st_auc_pixels", "generation/spectrum_distance", "privacy/copy_rate_pixels",
            "privacy/membership_auc_loss", "utility/gain_both", "latent/kl_nats", "refined/ssim",
            "refined/spectrum_distance", "decoded/fd_domain"} <= found.keys()  # fmt: skip
    assert found["generation/spectrum_distance"] < found["decoded/spectrum_distance"]
    assert json.loads((trained.reports / "metrics.json").read_text()) == found
    sizes = {}
    for name in ("samples", "samples_decoded", "reconstructions", "cases", "nearest_train"):
        with Image.open(trained.figures / f"{name}.png") as image:
            sizes[name] = image.size
    with Image.open(next((trained.images / "generated").glob("*.png"))) as image:
        assert image.size == (3 * SIDE, SIDE)
    with Image.open(next((trained.images / "real").glob("*.png"))) as image:
        assert image.size == (3 * SIDE, SIDE)
    assert sizes["samples"] == sizes["samples_decoded"]
    assert sizes["samples"][0] == 2 * (3 * 96 + 2) + 2  # two samples side by side, enlarged three times
    page = (trained.reports / "index.html").read_text()
    assert "32 × 32 × 32" in page and "volumes" in (trained.reports / "MODEL_CARD.md").read_text()


def test_volumes_are_generated_and_reconstructed_as_nifti(trained: Project, tmp_path: Path) -> None:
    artifacts = trained.root / "artifacts"
    paths = generate.run(artifacts, tmp_path / "new", n=3, file_format="nifti")
    again = generate.run(artifacts, tmp_path / "again", n=3, file_format="nifti")
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    image = nibabel.load(paths[0])
    assert image.shape == (SIDE, SIDE, SIDE) and nibabel.aff2axcodes(image.affine) == ("L", "P", "I")
    # 24, 24.2 and 24 mm along X, Y, Z are 31.7, 32 and 31.7 voxels of the grid
    np.testing.assert_allclose(image.header.get_zooms(), (24 / 32, 24 / 32, 24.2 / 32), atol=1e-4)
    assert image.header.get_xyzt_units()[0] == "mm"
    plain = generate.run(artifacts, tmp_path / "plain", n=3, file_format="nifti", refine=False)
    assert all(one.read_bytes() != other.read_bytes() for one, other in zip(plain, paths, strict=True))
    assert generate.run(artifacts, tmp_path / "png", n=1)[0].suffix == ".png"
    files = sorted((trained.root / "data" / "ball").iterdir())[:2]
    generate.reconstruct(artifacts, tmp_path / "pairs", files=files, file_format="nifti")
    with (tmp_path / "pairs" / "reconstructions.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == 2 and all(0 < float(row["ssim"]) <= 1 for row in rows)
    for file, row in zip(files, rows, strict=True):
        stem = row["image"].removesuffix(".png")
        written = generate.load_image(tmp_path / "pairs" / f"{stem}_reconstruction.nii.gz", SIZES)
        original = generate.load_image(file, SIZES)
        assert written.shape == original.shape == (1, 1, SIDE, SIDE, SIDE)
    generate.interpolate(artifacts, tmp_path / "path", ends=(files[0], files[1]), n=3)


def centre(path: Path) -> np.ndarray:
    """Centre of mass in mm of what is much brighter than the noise, by nibabel."""
    image = nibabel.load(path)
    voxels = image.get_fdata()
    bright = np.clip(voxels - np.quantile(voxels, 0.98) / 2, 0, None)
    indices = [(bright * places).sum() / bright.sum() for places in np.indices(voxels.shape)]
    return np.asarray(image.affine @ [*indices, 1])[:3]


@pytest.fixture
def oblique(trained: Project, tmp_path: Path, write_series: Callable[..., list[Path]]) -> tuple[Path, Path]:
    """A volume that is turned in the patient, as a NIfTI file and as a folder of DICOM slices."""
    image = nibabel.load(sorted((trained.root / "data" / "ball").iterdir())[0])
    affine = np.array([[1.1, -0.3, 0.1, -7], [0.3, 0.9, 0, 20], [-0.1, 0.05, 1.1, 3], [0, 0, 0, 1]])
    axes, sizes = np.linalg.qr(affine[:3, :3])
    affine[:3, :3] = axes @ np.diag(np.diag(sizes))  # perpendicular
    voxels = np.asarray(image.dataobj)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / "scan.nii.gz")
    write_series(tmp_path / "ct1", voxels, affine, intercept=0)
    return tmp_path / "scan.nii.gz", tmp_path / "ct1"


def test_maps_of_volumes_are_nifti_in_the_place_of_the_file(
    trained: Project, tmp_path: Path, oblique: tuple[Path, Path]
) -> None:
    artifacts, (file, _) = trained.root / "artifacts", oblique
    rows = uses.anomaly(artifacts, tmp_path / "maps", files=oblique, label="ball")
    assert [row["image"] for row in rows] == ["scan.png", "ct1.png"]
    assert {**rows[0], "file": "", "image": ""} == {**rows[1], "file": "", "image": ""}  # the series is the same volume
    model = medgen.load(project=trained.root, device="cpu")
    found = model.anomalies(model.read(file), label="ball")
    for name, key in (("error", "error"), ("ssim", "dissimilarity"), ("likelihood", "likelihood")):
        image = nibabel.load(tmp_path / "maps" / f"scan_{name}.nii.gz")
        assert image.get_data_dtype() == np.float32 and image.header.get_xyzt_units()[0] == "mm"
        # slices from the head on, rows from the front, columns from the right, as the model sees them
        np.testing.assert_allclose(image.get_fdata().T, found[key][0], atol=1e-6)
        other = nibabel.load(tmp_path / "maps" / f"ct1_{name}.nii.gz")
        np.testing.assert_allclose(other.affine, image.affine, atol=1e-3)
    with Image.open(tmp_path / "maps" / "scan.png") as figure:
        width, height = figure.size  # the volume, its reconstruction and the maps; of each three planes side by side
        assert 3 * 192 <= width < 3 * 200 and 5 * 192 <= height < 5 * 220
    (row,) = generate.reconstruct(artifacts, tmp_path / "pairs", files=[file], uncertainty=3)
    image = nibabel.load(tmp_path / "pairs" / "scan_uncertainty.nii.gz")
    np.testing.assert_allclose(image.get_fdata().T, model.uncertainty(model.read(file), n=3)[0, 0], atol=1e-6)
    assert float(row["uncertainty"]) == pytest.approx(image.get_fdata().mean(), abs=1e-4)


def test_a_hole_in_a_volume_is_filled_in_place(
    trained: Project, tmp_path: Path, oblique: tuple[Path, Path], write_series: Callable[..., list[Path]]
) -> None:
    """The result lies over the original in a viewer: a bright body has the same place in the patient in both."""
    artifacts, (file, series) = trained.root / "artifacts", oblique
    original = nibabel.load(file)
    hole = np.zeros(original.shape, np.uint8)
    hole[:5, :5, :5] = 1
    nibabel.save(nibabel.Nifti1Image(hole, original.affine), tmp_path / "hole.nii.gz")
    (row,) = uses.inpaint(artifacts, tmp_path / "one", file=file, mask=tmp_path / "hole.nii.gz")
    extents = np.multiply(original.header.get_zooms(), original.shape)  # mm
    assert float(row["hole"]) == pytest.approx(hole.mean() * np.prod(extents) / max(extents) ** 3, rel=0.15)
    written = tmp_path / "one" / "scan_inpainted.nii.gz"
    assert np.linalg.norm(centre(written) - centre(file)) < 0.3
    np.testing.assert_allclose(nibabel.load(written).header.get_zooms(), max(extents) / SIDE, rtol=0.03)
    write_series(tmp_path / "hole", hole, original.affine, intercept=0)
    uses.inpaint(artifacts, tmp_path / "two", file=series, mask=tmp_path / "hole")
    same = nibabel.load(tmp_path / "two" / "ct1_inpainted.nii.gz")
    np.testing.assert_array_equal(same.get_fdata(), nibabel.load(written).get_fdata())
    uses.inpaint(artifacts, tmp_path / "three", file=file, mask=tmp_path / "hole.nii.gz", file_format="png")
    with Image.open(tmp_path / "three" / "scan_inpainted.png") as planes:
        assert planes.size == (3 * SIDE, SIDE)


def test_a_counterfactual_of_a_volume_is_nifti(trained: Project, tmp_path: Path, oblique: tuple[Path, Path]) -> None:
    sizes, project = Model(name="cvae", dims=3, base_channels=4, max_channels=8, latent_channels=4), Project(tmp_path)
    info = dataclasses.replace(bundle.load_info(trained.model), model=sizes)
    torch.manual_seed(0)
    bundle.save(project.model, build_model(sizes, info.image_shape, 2), info)
    fitted = ANALYTIC["gmm"].fit(torch.randn(32, 4), torch.arange(32) % 2, 2, Prior(components=(1,)))
    save_prior(project.prior, fitted, bundle.digest(project.model))
    save_disabled(project.refiner, bundle.digest(project.model))
    (row,) = uses.counterfactual(project.model.parent, tmp_path / "out", files=oblique[:1], to="box", label="ball")
    assert (row["label"], row["to"]) == ("ball", "box")
    model = medgen.load(project.model.parent, device="cpu")
    expected = model.counterfactual(model.read(oblique[0]), label="ball", to="box")
    image = nibabel.load(tmp_path / "out" / "scan_counterfactual.nii.gz")
    np.testing.assert_array_equal(image.get_fdata().T, expected[0, 0])


def test_a_version_and_the_python_api_give_the_same_refined_volumes(trained: Project) -> None:
    version = pyfunc.Generator()
    parts = {"model": trained.model, "prior": trained.prior, "refiner": trained.refiner}
    version.load_context(SimpleNamespace(artifacts={name: str(path) for name, path in parts.items()}))
    model, rows = medgen.load(project=trained.root), {"n": [2], "label": ["ball"], "seed": [3]}
    for refine in (True, False):
        volumes = version.predict(None, pd.DataFrame({**rows, "refine": [refine]}))
        assert volumes.shape == (2, SIDE, SIDE, SIDE, 1)
        assert np.array_equal(volumes[..., 0], model.sample(2, "ball", 3, refine)[:, 0])
    assert not np.array_equal(volumes[..., 0], model.sample(2, "ball", 3)[:, 0])


def test_the_python_api_takes_and_returns_volumes(trained: Project) -> None:
    model, split = medgen.load(project=trained.root), medgen.open_dataset(trained.dataset).split("test")
    volumes = split.images[:2]
    assert model.image_shape == (1, SIDE, SIDE, SIDE)
    assert model.sample(2, seed=0).shape == volumes.shape == model.reconstruct(volumes).shape
    assert model.encode(volumes[0, 0]).shape == (1, 4)
    found = model.anomalies(volumes, label="ball")
    assert {name: found[name].shape for name in ("l1", "error", "dissimilarity", "likelihood")} == {
        "l1": (2,), "error": (2, SIDE, SIDE, SIDE), "dissimilarity": (2, SIDE, SIDE, SIDE),
        "likelihood": (2, SIDE, SIDE, SIDE),
    }  # fmt: skip
    assert model.uncertainty(volumes, n=3).shape == volumes.shape
    hole = np.zeros((SIDE, SIDE, SIDE), bool)
    hole[8:24, 8:24, 8:24] = True
    filled = model.inpaint(volumes[0], hole, label="ball")
    assert np.array_equal(filled[0, 0][~hole], volumes[0, 0][~hole])
    with pytest.raises(UserError, match=r"images: found shape 32 x 32; expected \(N, C, D, H, W\)"):
        model.encode(volumes[0, 0, 0])
    scores = medgen.evaluate(split, split, train=split)
    assert scores["generation/c2st_auc_spectrum"] < 0.6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Train(augment=Augment(vertical_flip=True)), r"train\.augment: changes images"),
        (Train(precision="bf16", device="cpu"), r"train\.precision: bf16; .*use auto or fp32"),
    ],
)
def test_settings_that_volumes_cannot_have_are_refused(trained: Project, settings: Train, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train.run(trained, model=Model(name="vae", dims=3), loss=Loss(), train=settings, tracking=OFF)


@pytest.mark.slow
def test_a_unet_finds_masks_in_volumes_by_patches(tmp_path: Path, draw_volumes: Draw) -> None:
    """Patches, windows over whole volumes, and masks aligned with their volumes."""
    project = Project(tmp_path)
    draw_volumes(tmp_path / "data", 40, with_masks=True)
    preprocess.run(project, data=Data(), preprocess=SIZES)
    store = open_store(project.dataset)
    split = store.split("train")
    assert split.masks is not None and split.masks.shape[1:] == (1, SIDE, SIDE, SIDE)
    bright = (split.images[:] > 100).astype(np.uint8)
    overlap = 2 * (bright * split.masks[:]).sum() / (bright.sum() + split.masks[:].sum())
    assert overlap > 0.95
    phase = PHASE.model_copy(update={"epochs": 20, "learning_rate": 1e-2})
    train.run(
        project,
        model=Model(name="unet", dims=3, base_channels=4, max_channels=8),
        loss=Loss(weights=Weights(bce=1.0, dice=1.0)),
        train=Train(batch_size=4, patch=(16, 32, 32), phases=(phase,)),
        tracking=OFF,
    )
    prior.run(project, prior=Prior(), tracking=OFF)
    found = evaluate.run(project, evaluate=Evaluate(), tracking=OFF)
    assert found is not None and found["segmentation/dice_foreground"] > 0.8
    assert found["segmentation/dice_foreground"] > found["segmentation/dice_foreground_mean_mask"]
    model, info = bundle.load(project.model)
    assert info.patch == (16, 32, 32)
    assert model.predict(torch.rand(1, 1, SIDE, SIDE, SIDE)).prediction.shape == (1, 1, SIDE, SIDE, SIDE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vqvae", "spatial_vae", "vae"])
def test_masks_and_volumes_are_conditions_of_volumes(
    tmp_path: Path, draw_volumes: Draw, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """From files to a request, and the agreement by planes; a flat latent is refused with what to do."""
    project = Project(tmp_path)
    draw_volumes(tmp_path / "data", 40, with_masks=True)
    shutil.copytree(tmp_path / "data" / "images", tmp_path / "data" / "contrast")
    kinds = {"mask": Condition(kind="mask"), "contrast": Condition(kind="image", folder="contrast")}
    preprocess.run(project, data=Data(), preprocess=SIZES.model_copy(update={"conditions": kinds}))
    split = open_store(project.dataset).split("train")
    assert split.paired is not None and (split.paired[:] == split.images[:]).all(), "copies, read as the volumes are"
    extractor.run(project, features=Features(width=4, epochs=1))
    sizes = {"vae": {}, "spatial_vae": {"latent_size": 8}, "vqvae": {"latent_size": 8, "num_embeddings": 16}}
    model = Model(name=name, dims=3, base_channels=4, max_channels=8, attention_resolutions=(), **sizes[name])  # type: ignore[arg-type]
    train.run(project, model=model, loss=Loss(), train=Train(batch_size=8, phases=(PHASE,)), tracking=OFF)
    monkeypatch.setattr(prior, "STEPS_PER_EPOCH", 10)
    params = Prior(channels=8, blocks=1, epochs=1, batch_size=8, sampling_steps=2)
    if name == "vae":
        with pytest.raises(UserError, match="mask, contrast of volumes need a latent with a grid"):
            prior.run(project, prior=params, tracking=OFF)
        return
    assert prior.run(project, prior=params, tracking=OFF) is not None
    refiner.run(project, refiner=REFINER, tracking=OFF)
    file = next((tmp_path / "data" / "masks").iterdir())
    texts = ["", f"mask={file}", f"contrast={tmp_path / 'data' / 'contrast' / file.name}"]
    drawn = [
        generate.run(tmp_path / "artifacts", tmp_path / str(n), n=1, condition=text)[0] for n, text in enumerate(texts)
    ]
    assert len({path.read_bytes() for path in drawn}) == 3
    if name == "vqvae":
        return
    monkeypatch.setattr(conditions, "MAP_STEPS", 40)
    found = evaluate.run(project, evaluate=Evaluate(num_generated=24, grid_images=4), tracking=OFF)
    assert found is not None
    assert found["condition/mask_dice_real"] > found["condition/mask_dice_baseline"] > 0
    assert found["condition/contrast_correlation_real"] > 0.9, "the same volume"
    assert (project.figures / "conditions.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vqvae", "spatial_vae"])
def test_priors_of_3d_latents(tmp_path: Path, draw_volumes: Draw, name: str) -> None:
    """tokens and flow draw 3-D grids of latents, which the model decodes by windows and the refiner sees as a whole."""
    project = Project(tmp_path)
    draw_volumes(tmp_path / "data", 24)
    preprocess.run(project, data=Data(), preprocess=SIZES)
    sizes = {"base_channels": 4, "max_channels": 8, "latent_channels": 2, "latent_size": 4, "attention_resolutions": ()}
    model = Model(name=name, dims=3, **sizes, **({"num_embeddings": 8} if name == "vqvae" else {}))
    settings = Train(batch_size=4, patch=(16, 16, 32), phases=(PHASE,))
    train.run(project, model=model, loss=Loss(weights=Weights(l1=1.0)), train=settings, tracking=OFF)
    family = "tokens" if name == "vqvae" else "flow"
    fitted = prior.run(project, prior=Prior(name=family, channels=8, blocks=1, epochs=1), tracking=OFF)
    assert refiner.run(project, refiner=REFINER, tracking=OFF) is not None
    assert fitted is not None and fitted.latent_shape == (2, 4, 4, 4)
    paths = generate.run(tmp_path / "artifacts", tmp_path / "new", n=2, file_format="nifti")
    assert nibabel.load(paths[0]).shape == (SIDE, SIDE, SIDE)


@pytest.mark.slow
def test_a_flow_draws_volumes_with_conditions(
    tmp_path: Path, draw_volumes: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The condition is looked for in the planes of samples and of test volumes."""
    monkeypatch.setattr("medgen.evaluation.conditions.STEPS", 5)
    project = Project(tmp_path)
    draw_volumes(tmp_path / "data", 60)
    rows = ["path,patient,sex"]
    files = sorted((tmp_path / "data").glob("*/*.nii.gz"))
    rows += [f"{path.parent.name}/{path.name},{path.name[:9]},{'FM'[i % 2]}" for i, path in enumerate(files)]
    (tmp_path / "data" / "manifest.csv").write_text("\n".join(rows) + "\n")
    sizes = SIZES.model_copy(update={"conditions": {"sex": Condition(kind="category")}})
    preprocess.run(project, data=Data(), preprocess=sizes)
    extractor.run(project, features=Features(width=4, epochs=1))
    model = Model(name="vae", dims=3, base_channels=4, max_channels=8, latent_channels=4)
    settings = Train(batch_size=8, phases=(PHASE,))
    train.run(project, model=model, loss=Loss(weights=Weights(l1=1.0)), train=settings, tracking=OFF)
    prior.run(project, prior=Prior(name="flow", channels=8, blocks=1, epochs=1), tracking=OFF)
    refiner.run(project, refiner=Refiner(), tracking=OFF)
    found = evaluate.run(project, evaluate=Evaluate(num_generated=24, grid_images=4), tracking=OFF)
    assert found is not None and 0.0 <= found["condition/sex_accuracy"] <= 1.0
    assert (project.figures / "conditions.png").exists()
