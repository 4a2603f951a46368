"""`medgen anomaly`, `counterfactual`, `inpaint` and `reconstruct --uncertainty`: files, tables and refusals."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import medgen
from medgen.config import Model, Project
from medgen.errors import UserError
from medgen.models import bundle
from medgen.serving import generate, uses

Built = Callable[..., tuple[Path, list[Path]]]
NETWORK = Model(base_channels=8, latent_size=8, latent_channels=2, attention_resolutions=())
CVAE = Model(name="cvae", base_channels=4, latent_channels=6)


@pytest.fixture(scope="module")
def built(tiny_store: Path, trained: Callable[..., Project], tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Function that gives the artifacts of a model with random weights, made once, and two image files of its data."""
    made: dict[str, tuple[Path, list[Path]]] = {}

    def build(sizes: Model = NETWORK) -> tuple[Path, list[Path]]:
        if sizes.name not in made:
            project = Project(tmp_path_factory.mktemp(sizes.name))
            shutil.copytree(tiny_store, project.dataset)
            trained(project, sizes)
            rng = np.random.default_rng(0)
            files = [project.root / name / "chest.png" for name in bundle.load_info(project.model).classes[:2]]
            for file in files:
                file.parent.mkdir()
                cv2.imwrite(str(file), rng.integers(0, 255, (48, 48), dtype=np.uint8))
            made[sizes.name] = project.model.parent, files
        return made[sizes.name]

    return build


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def tiff(path: Path) -> NDArray[Any]:
    pixels: NDArray[Any] = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert pixels.dtype == np.float32
    return pixels


def test_anomaly_writes_maps_and_scores(built: Built, tmp_path: Path) -> None:
    artifacts, files = built()
    rows = uses.anomaly(artifacts, tmp_path / "out", files=files, label="0")
    assert table(tmp_path / "out", "anomalies") == rows
    assert [row["image"] for row in rows] == ["chest.png", "chest_2.png"]
    names = {f"chest_{name}{number}.tif" for name in ("error", "ssim", "likelihood") for number in ("", "_2")}
    assert {path.name for path in (tmp_path / "out").glob("*.tif")} == names
    model = medgen.load(artifacts, device="cpu")
    found = model.anomalies(model.read(files[1]), label="0")
    np.testing.assert_allclose(tiff(tmp_path / "out" / "chest_error_2.tif"), found["error"][0], atol=1e-6)
    assert {name: f"{found[name][0]:.4f}" for name in ("l1", "ssim", "nll")}.items() <= rows[1].items()
    assert float(rows[1]["l1"]) == pytest.approx(found["error"].mean(), abs=1e-4)


@pytest.mark.parametrize("sizes", [NETWORK, CVAE], ids=["grid", "conditional"])
def test_uncertainty_is_written_beside_the_reconstruction(built: Built, tmp_path: Path, sizes: Model) -> None:
    artifacts, files = built(sizes)
    plain = generate.reconstruct(artifacts, tmp_path / "plain", files=files)
    rows = generate.reconstruct(artifacts, tmp_path / "out", files=files, uncertainty=8)
    assert [{name: row[name] for name in plain[0]} for row in rows] == plain, "the scores stay the same"
    deviation = tiff(tmp_path / "out" / "chest_uncertainty_2.tif")
    assert float(rows[1]["uncertainty"]) == pytest.approx(deviation.mean(), abs=1e-4) and deviation.min() > 0.0
    model = medgen.load(artifacts, device="cpu")
    label = files[1].parent.name if sizes is CVAE else None
    np.testing.assert_allclose(deviation, model.uncertainty(model.read(files[1]), label, n=8)[0, 0], atol=1e-6)


def test_counterfactual_writes_the_image_with_the_other_label(built: Built, tmp_path: Path) -> None:
    artifacts, files = built(CVAE)
    classes = bundle.load_info(artifacts / "model").classes
    rows = uses.counterfactual(artifacts, tmp_path / "out", files=files, to=classes[2])
    assert [(row["label"], row["to"]) for row in rows] == [(classes[0], classes[2]), (classes[1], classes[2])]
    model = medgen.load(artifacts, device="cpu")
    expected = model.decode(model.encode(model.read(files[1]), label=1), label=2)
    written = cv2.imread(str(tmp_path / "out" / "chest_counterfactual_2.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_allclose(written, expected[0, 0], atol=1)
    assert (model.counterfactual(model.read(files[1]), label=1, to=classes[2]) == expected).all()


def test_inpaint_keeps_the_pixels_outside_the_mask(built: Built, tmp_path: Path) -> None:
    artifacts, files = built()
    mask = np.zeros((48, 48), np.uint8)
    mask[12:24, 18:36] = 255
    cv2.imwrite(str(tmp_path / "hole.png"), mask)
    (row,) = uses.inpaint(artifacts, tmp_path / "out", file=files[0], mask=tmp_path / "hole.png")
    written = cv2.imread(str(tmp_path / "out" / "chest_inpainted.png"), cv2.IMREAD_UNCHANGED)
    model = medgen.load(artifacts, device="cpu")
    original, hole = model.read(files[0]), cv2.resize(mask, (32, 32), interpolation=cv2.INTER_AREA) > 127
    assert (written[~hole] == original[0, 0][~hole]).all() and (written[hole] != original[0, 0][hole]).any()
    assert float(row["hole"]) == pytest.approx(hole.mean(), abs=1e-4)
    assert (model.inpaint(original, hole)[0, 0] == written).all()


@pytest.mark.parametrize(
    ("sizes", "call", "message"),
    [
        (NETWORK, lambda model, out, files: uses.anomaly(model, out, files=files, label="x"), r"label"),
        (
            CVAE,
            lambda model, out, files: uses.anomaly(model, out, files=files),
            r"label: missing, but cvae needs one.*--label",
        ),
        (
            NETWORK,
            lambda model, out, files: uses.counterfactual(model, out, files=files, to="0"),
            r"counterfactual: .*cvae.*prior\.name=flow",
        ),
        (CVAE, lambda model, out, files: uses.counterfactual(model, out, files=files, to="none"), r"label.*none"),
        (
            Model(name="autoencoder", base_channels=4, latent_channels=2, latent_size=8),
            lambda model, out, files: generate.reconstruct(model, out, files=files, uncertainty=5),
            "no variance",
        ),
    ],
)
def test_what_a_model_cannot_do_is_refused(
    built: Built, tmp_path: Path, sizes: Model, call: Callable[..., Any], message: str
) -> None:
    artifacts, files = built(sizes)
    with pytest.raises(UserError, match=message):
        call(artifacts, tmp_path / "out", files)
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_mask_of_another_shape_is_refused(built: Built, tmp_path: Path) -> None:
    artifacts, files = built()
    for size in ((48, 20), (0, 0)):
        path = tmp_path / "hole.png"
        path.write_text("not an image") if size == (0, 0) else cv2.imwrite(str(path), np.full(size, 255, np.uint8))
        with pytest.raises(UserError, match=r"--mask .*hole\.png"):
            uses.inpaint(artifacts, tmp_path / "out", file=files[0], mask=path)


def test_the_api_checks_its_arguments(built: Built) -> None:
    artifacts, files = built()
    model = medgen.load(artifacts, device="cpu")
    image = model.read(files[0])
    for call, message in (
        (lambda: model.inpaint(image, np.ones((3, 3), bool)), "hole: found bool"),
        (lambda: model.inpaint(np.concatenate([image, image]), np.ones((32, 32), bool)), "image: found 2 images"),
        (lambda: model.uncertainty(image, n=1), "n: found 1"),
        (lambda: model.counterfactual(image, 0, 1), "counterfactual"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert torch.is_grad_enabled()
