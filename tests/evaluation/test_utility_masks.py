"""Stage `utility` where masks are a condition: U-Nets are trained on samples with their requested masks."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor

from medgen.config import Features, Preprocess, Project, Utility, seed_of
from medgen.data.images import StoredImages, to_floats
from medgen.data.store import Store, StoreWriter, open_store
from medgen.errors import UserError
from medgen.evaluation import segmenter, utility
from medgen.evaluation.segmenter import MaskedImages, StoredMasks
from medgen.evaluation.training_sets import utility_metrics
from medgen.io import hash_file
from medgen.nn.conditions import Conditions

SIDE, NUM_TRAIN, NUM_TEST = 32, 30, 20
WITHOUT_MASK = (3, 34)  # a train and a test image
FEATURES = Features(width=4, batch_size=8)
SMALL = Utility(enabled=True, fractions=(0.2,), repetitions=2, steps=2, num_generated=58)
CPU = torch.device("cpu")


def draw(mask: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, 1, 32, 32) in [0, 1] that are brighter inside of masks of the same shape, and noisy."""
    return (0.2 + 0.5 * mask + 0.2 * torch.rand(mask.shape, generator=generator)).clamp(0.0, 1.0)


def write_store(
    folder: Path, masks: str = "train and test", labels: str = "", conditions: bool = True, num_classes: int = 2
) -> Store:
    """A store of discs at random places, two images a patient, each of the next class of `labels`.

    Masks of three classes have class 2 in the lower half of an image.
    """
    grid, random, generator = np.mgrid[:SIDE, :SIDE], np.random.default_rng(0), torch.Generator().manual_seed(0)
    kinds = {"mask": {"kind": "mask"}} if conditions else {}
    values = None if num_classes == 2 else (0, 100, 200)
    settings = Preprocess(image_size=SIDE, conditions=kinds, mask_values=values).model_dump(mode="json")
    splits = ["train"] * NUM_TRAIN + ["test"] * NUM_TEST
    with StoreWriter(folder, (1, SIDE, SIDE), with_masks=bool(masks)) as writer:
        for number, split in enumerate(splits):
            middle = random.uniform(8, 24, 2)
            mask = ((grid - middle[:, None, None]) ** 2).sum(0) < random.uniform(4, 8) ** 2
            image = 255 * draw(torch.from_numpy(mask)[None, None].float(), generator)[0]
            row = {"path": f"{number}.png", "patient": f"p{number // 2}"}
            if split in masks and number not in WITHOUT_MASK:
                row["mask"] = f"{number}.png"
            if labels:
                row["label"] = labels[number % len(labels)]
            classes = mask[None].astype(np.uint8)
            classes[:, SIDE // 2 :] *= num_classes - 1
            writer.add(image.byte().numpy(), classes if masks else None, row)
        writer.commit(splits, [], settings, "0" * 12)
    return open_store(folder)


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A dataset with masks and without labels; a train and a test image have no mask."""
    return write_store(tmp_path_factory.mktemp("discs") / "artifacts" / "dataset")


@pytest.fixture(autouse=True)
def small_u_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """U-Nets that train in seconds."""
    monkeypatch.setattr(segmenter, "CHANNELS", 8)
    monkeypatch.setattr(segmenter, "BATCH_SIZE", 8)


def fake_generator(store: Store, conditional: bool = True) -> Any:
    """A generator whose prior takes the conditions and the classes of a dataset."""
    frequencies = torch.ones(len(store.classes))
    prior = SimpleNamespace(
        frequencies=frequencies,
        conditional=conditional and len(frequencies) > 0,
        space=store.conditions if conditional else None,
    )
    return SimpleNamespace(prior=prior, model=SimpleNamespace(conditional=False, space=None), refiner=None)


def draw_requested(*args: Any, conditions: Any, **_: Any) -> Iterator[tuple[Tensor, None]]:
    """As `iterate_samples`, in batches of 7: images that have the requested mask."""
    count, generator = args[2], torch.Generator().manual_seed(args[4])
    for start in range(0, count, 7):
        own: Conditions = conditions[torch.arange(start, min(start + 7, count))]
        assert own.maps is not None and bool((own.maps[:, 0] == 1).all()), "every sample is requested with a mask"
        yield draw(own.maps[:, 1:], generator), None


@pytest.mark.parametrize("num_generated", [10, 29, 58, 70])
def test_samples_are_requested_with_the_masks_of_train_images_evenly(
    discs: Store, num_generated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utility, "iterate_samples", draw_requested)
    params = SMALL.model_copy(update={"num_generated": num_generated})
    pairs = utility.draw_masked_samples(discs, fake_generator(discs), FEATURES, params)
    assert pairs.images.shape == (num_generated, 1, SIDE, SIDE) and pairs.images.dtype == torch.uint8
    images, masks = to_floats(pairs.images[:])[:, 0], pairs.masks[torch.arange(num_generated)].bool()
    assert (images[masks] > 0.65).all() and (images[~masks] < 0.45).all(), "a sample has its mask"
    train = discs.split("train")
    assert train.masks is not None
    of_train = [train.masks[row].tobytes() for row in train.masked_rows]
    counts = [[each.numpy().tobytes() for each in masks.byte()].count(mask) for mask in of_train]
    assert sum(counts) == num_generated and max(counts) - min(counts) <= 1


@pytest.mark.slow
def test_useful_pairs_train_a_u_net_and_masks_of_other_images_ruin_it(discs: Store) -> None:
    train = discs.split("train")
    rows = torch.from_numpy(train.masked_rows)
    params = SMALL.model_copy(update={"steps": 80, "fractions": ()})
    for useful in (True, False):
        pairs = MaskedImages(StoredImages(train, rows)[:], StoredMasks(train, rows if useful else rows.roll(7)))
        result = utility.compare_segmenters(discs, pairs, FEATURES, params, CPU)
        assert result.rows.tolist() == discs.split("test").masked_rows.tolist()
        metrics = utility_metrics(discs, [result])
        assert metrics["utility/dice_real"] > 0.85
        dice, gain = metrics["utility/dice_synthetic"], metrics["utility/gain_dice_synthetic"]
        assert gain == pytest.approx(dice - metrics["utility/dice_real"], abs=1e-6)
        assert dice > 0.85 if useful else metrics["utility/gain_dice_synthetic_ci_high"] < -0.3


@pytest.mark.slow
def test_masks_of_three_classes_are_compared_with_scikit_learn(tmp_path: Path) -> None:
    store = write_store(tmp_path / "dataset", num_classes=3)
    train, test = (store.split(name) for name in ("train", "test"))
    rows = torch.from_numpy(train.masked_rows)
    params = SMALL.model_copy(update={"steps": 60, "fractions": ()})
    result = utility.compare_segmenters(store, MaskedImages.stored(train, rows), FEATURES, params, CPU)
    seed = seed_of(params.seed, 2, 0)
    network = segmenter.train_segmenter([MaskedImages.stored(train, rows)], store, params.steps, seed, CPU)
    assert test.masks is not None
    expected = []
    for row in test.masked_rows:
        with torch.no_grad():
            found = network(to_floats(torch.from_numpy(test.images[[row]]))).prediction.argmax(dim=1)
        true, predicted = test.masks[row].ravel(), found.numpy().ravel()
        labels = sorted({*true, *predicted} - {0})
        expected.append(f1_score(true, predicted, labels=labels, average="macro"))
    np.testing.assert_allclose(result["real"][0], expected, atol=1e-6)
    assert np.mean(expected) > 0.1, "masks are found"


def test_the_stage_needs_no_labels_and_is_reproducible(
    discs: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = Project(discs.folder.parent.parent)
    monkeypatch.setattr(utility, "iterate_samples", draw_requested)
    monkeypatch.setattr(utility, "load_generator", lambda *_: fake_generator(discs))
    for folder in (project.model, project.prior):
        folder.mkdir()
    found, digests = [], []
    for _ in range(2):
        torch.rand(3)
        found.append(utility.run(project, features=FEATURES, utility=SMALL))
        digests.append([hash_file(path) for path in sorted(project.utility.iterdir())])
    assert found[0] == found[1] and digests[0] == digests[1]
    out = capsys.readouterr().out
    assert "no classifier is trained, because labels do not change what the model generates" in out
    assert "utility: Dice on the test split, trained on real images" in out
    assert found[0] is not None and "utility/dice_both_20" in found[0]
    assert not any("accuracy" in key for key in found[0])
    loaded = utility.load_utility(project, discs.fingerprint)
    assert utility_metrics(discs, loaded) == pytest.approx(found[0], rel=1e-5)
    assert [each.key for each in loaded[0].sets] == ["synthetic", "real_20", "both_20", "real", "both"]
    assert [each.num_real for each in loaded[0].sets] == [0, 6, 6, 29, 29], "20 %: three patients"
    assert [each.num_synthetic for each in loaded[0].sets] == [58, 0, 58, 0, 58]
    description = json.loads((project.utility / "utility.json").read_text())
    assert "sets" not in description and len(description["mask_sets"]) == 5
    with pytest.raises(UserError, match="run `medgen utility` again"):
        utility.load_utility(project, "other")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(utility, "score_masks", interrupt)
    with pytest.raises(KeyboardInterrupt):
        utility.run(project, features=FEATURES, utility=SMALL)
    assert [hash_file(path) for path in sorted(project.utility.iterdir())] == digests[0], "the earlier result is kept"


@pytest.mark.parametrize(
    ("dataset", "conditional", "classifier", "segmenter"),
    [
        ({"labels": "ab"}, True, None, None),
        ({"labels": "a"}, True, "labels do not change", None),
        ({}, True, "labels do not change", None),
        ({"labels": "ab"}, False, "labels do not change", "masks do not change"),
        ({"labels": "ab", "conditions": False}, True, None, "masks do not change"),
        ({"labels": "ab", "masks": ""}, True, None, "0 train and 0 test images have a mask"),
        ({"masks": "train"}, True, "labels do not change", "29 train and 0 test images have a mask"),
        ({"masks": "test"}, True, "labels do not change", "0 train and 19 test images have a mask"),
    ],
)
def test_what_is_missing_is_one_clear_message(
    dataset: dict[str, Any],
    conditional: bool,
    classifier: str | None,
    segmenter: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    project = Project(tmp_path)
    store = write_store(project.dataset, **dataset)
    generator = fake_generator(store, conditional)
    reasons = (
        utility.missing_for_classifiers(store, generator, SMALL),
        utility.missing_for_segmenters(store, generator),
    )
    for reason, words in zip(reasons, (classifier, segmenter), strict=True):
        assert reason is None if words is None else words in str(reason) and "(expected " in str(reason)
    if all(reasons):
        monkeypatch.setattr(utility, "load_generator", lambda *_: generator)
        with pytest.raises(UserError, match=r"no classifier, because .* no U-Net, because .* utility.enabled to false"):
            utility.run(project, features=FEATURES, utility=SMALL)
        assert not project.utility.exists()
