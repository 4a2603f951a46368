"""`medgen.evaluate`: the values of `medgen evaluate` for the same images, and checked sets."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import medgen
from medgen.config import Evaluate, Project, Tracking
from medgen.data.store import open_store
from medgen.errors import UserError
from medgen.evaluation import evaluate
from medgen.metrics import c2st


@pytest.fixture(scope="module", autouse=True)
def short_training():
    """Train the classifiers on pixels for two steps, which takes a fraction of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c2st, "_STEPS", 2)
        yield


@pytest.fixture(scope="module")
def evaluated(patients_store, trained, tmp_path_factory):
    """A project after an evaluation that saved its images."""
    project = Project(tmp_path_factory.mktemp("evaluated"))
    shutil.copytree(patients_store, project.dataset)
    params = Evaluate(num_generated=25, batch_size=7, grid_images=4, save_images=True, seed=2)
    evaluate.run(trained(project), evaluate=params, tracking=Tracking(enabled=False))
    return project


@pytest.fixture(scope="module")
def metrics(evaluated):
    return json.loads((evaluated.reports / "metrics.json").read_text())


@pytest.fixture(scope="module")
def generated(evaluated):
    """The evaluated samples (N, H, W), read from their files."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted(evaluated.images.glob("generated/*.png"))])


@pytest.fixture(scope="module")
def dataset(evaluated):
    return open_store(evaluated.dataset)


def test_values_are_those_of_the_evaluation_of_the_same_images(evaluated, metrics, generated, dataset):
    test, train = dataset.split("test"), dataset.split("train")
    found = medgen.evaluate(generated, test, train=train, extractor=evaluated.features, seed=2)
    bands = {f"generation/spectrum_ratio_{band}_floor" for band in range(1, 6)}  # metrics.json: only with a refiner
    others = {key for key in metrics if key.startswith(("generation/ms_ssim", "generation/label_accuracy"))}
    expected = {key: value for key, value in metrics.items() if key.startswith("generation/") and key not in others}
    assert "generation/c2st_auc_pixels" in expected
    assert set(found) == set(expected) | bands
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_patients_may_be_given_with_an_array(dataset):
    train, test = dataset.split("train"), dataset.split("test")
    by_split = medgen.evaluate(train.images, test)
    assert medgen.evaluate(train.images, test.images, patients=test.patients) == by_split
    by_image = medgen.evaluate(train.images, test.images)
    assert by_image["generation/spectrum_distance"] == by_split["generation/spectrum_distance"]
    assert by_image["generation/c2st_auc_spectrum_ci_low"] != by_split["generation/c2st_auc_spectrum_ci_low"]


def test_without_an_extractor_only_spectra_and_pixels_are_compared(generated, dataset):
    found = medgen.evaluate(generated, dataset.split("test"))
    names = {key.removeprefix("generation/").removesuffix("_low").removesuffix("_high") for key in found}
    tests = {f"c2st_auc{view}{end}" for view in ("", "_spectrum", "_pixels") for end in ("", "_ci")}
    assert names == tests | {"spectrum_distance", *(f"spectrum_ratio_{band}" for band in range(1, 6))}


def test_floats_are_rounded_to_grey_values(generated, dataset):
    real = dataset.split("test").images[:]
    assert medgen.evaluate(generated / 255.0, real / 255.0) == medgen.evaluate(generated, real)


def test_blurred_images_have_less_power_and_are_found(dataset):
    real = dataset.split("train").images[:] / 255.0
    blurred = (real[..., :-1, :-1] + real[..., 1:, :-1] + real[..., :-1, 1:] + real[..., 1:, 1:]) / 4.0
    found = medgen.evaluate(blurred, dataset.split("test").images[..., 1:, 1:])
    assert found["generation/spectrum_ratio_5"] < 0.3
    assert found["generation/c2st_auc_spectrum"] > 0.9


@pytest.mark.parametrize(
    ("images", "reference", "options", "message"),
    [
        ((9, 32, 32), (12, 32, 32), {}, r"images: found 9 images; expected at least 10"),
        ((12, 32, 32), (9, 32, 32), {}, r"reference: found 9 images; expected at least 10"),
        (
            (12, 32, 32),
            (12, 32, 32),
            {"patients": ["a", "b", "c"] * 4},
            r"reference: found 3 patients; expected at least",
        ),
        ((12, 32, 32), (12, 32, 32), {"patients": ["a"] * 3}, r"patients: found 3; expected one for each of the 12"),
        ((12, 16, 16), (12, 32, 32), {}, r"images: found images of shape 12 x 16 x 16; .* 1 x 32 x 32"),
        (
            (12, 3, 32, 32),
            (12, 3, 32, 32),
            {"extractor": True},
            r"reference: found 3 channels; expected 1, as the extr",
        ),
        ((12, 16, 16), (12, 16, 16), {"extractor": True}, r"reference: .* side of 16 pixels; expected at least 32"),
        ((12, 8, 8), (12, 8, 8), {}, r"reference: found images with a side of 8 pixels; expected at least 16"),
        ((12, 32, 32), (12, 32, 32), {"extractor": "elsewhere"}, r"elsewhere/extractor\.json: not found"),
    ],
)
def test_sets_that_cannot_be_compared_are_errors(evaluated, images, reference, options, message):
    if options.get("extractor") is True:
        options = options | {"extractor": evaluated.features}
    with pytest.raises(UserError, match=message):
        medgen.evaluate(np.zeros(images, np.uint8), np.zeros(reference, np.uint8), **options)
