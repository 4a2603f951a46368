"""Known faults in drawn radiographs: the metrics that detect each, and those known to miss it.

A drawn image of another patient is a perfect sample. Features come from an untrained extractor, so that the tests need
no training; benchmarks/measures.py has the same cases with a trained extractor (docs/measures.md).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from medgen.datasets.sample import CLASSES, render
from medgen.metrics import privacy
from medgen.metrics.c2st import linear_auc
from medgen.metrics.comparison import ImageSet, compare
from medgen.metrics.features import DomainExtractor, ExtractorSizes
from medgen.metrics.mmd import median_distance
from medgen.metrics.spectrum import band_ratios, log_power, radial_power

NUM_IMAGES, NUM_COPIES = 240, 6
Change = Callable[[Tensor], Tensor]  # images (N, 1, 64, 64) in [0, 1] -> changed ones


def drawn(first_patient: int, labels: Sequence[str] = CLASSES * (NUM_IMAGES // 3)) -> Tensor:
    """Images (N, 1, 64, 64) in [0, 1] of as many patients, with these labels."""
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(lambda i: render(labels[i], 7, first_patient + i, 0, 64)[0], range(len(labels))))
    return torch.from_numpy(np.stack(images))[:, None].float() / 255.0


class ReferenceSets:
    """Drawn sets of images, and the detection of faults in samples."""

    def __init__(self) -> None:
        self.train, self.held_out, self.champion, self.samples = (drawn(1000 * part) for part in range(4))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.extractor = DomainExtractor(ExtractorSizes(1, 64, 16, len(CLASSES))).eval()
        with torch.no_grad():
            self.extractor.standardise([self.train], [self.train])
        self.bandwidth = median_distance(self.describe(self.train).features)

    @torch.no_grad()
    def describe(self, images: Tensor) -> ImageSet:
        return ImageSet(self.extractor(images), radial_power(images))

    def detected_by(self, samples: Tensor) -> set[str]:
        """Metrics by which the samples are worse than the champion's, different from real images, or copies."""
        own, champion, held_out = (self.describe(images) for images in (samples, self.champion, self.held_out))
        tests = compare(own, champion, held_out, self.bandwidth, num_permutations=199)
        found = {one.name for one in tests if one.p < 0.05}
        if not 0.8 < band_ratios(own.power, held_out.power)[-1] < 1.25:
            found.add("power ratio")
        if linear_auc(log_power(held_out.power), log_power(own.power)).low > 0.55:
            found.add("c2st of spectra")
        train = self.describe(self.train).content
        for name, nearest, images in (
            (
                "copies by features",
                lambda of, train: privacy.nearest_by_features(of, [train]),
                [v.content for v in (own, held_out)],
            ),
            ("copies by pixels", privacy.nearest_by_pixels, [samples, self.held_out]),
        ):
            reference = train if name.endswith("features") else self.train
            copies = privacy.find_copies(*(nearest(part, reference) for part in images))
            if copies.rate > copies.plausible or float(copies.relative_distance.min()) < privacy.CERTAIN_COPY:
                found.add(name)
        return found


@pytest.fixture(scope="module")
def sets() -> ReferenceSets:
    return ReferenceSets()


def filtered(function: Callable[[np.ndarray], np.ndarray]) -> Change:
    return lambda images: torch.from_numpy(np.stack([function(image[0].numpy()) for image in images]))[:, None]


def blur(sigma: float) -> Change:
    return filtered(lambda image: cv2.GaussianBlur(image, (0, 0), sigma))


def smoothed_lungs(images: Tensor) -> Tensor:
    inside = images < images.flatten(1).median(dim=1).values[:, None, None, None]
    inside[..., :10, :] = inside[..., -16:, :] = inside[..., :10] = inside[..., -10:] = False
    return torch.where(inside, filtered(lambda image: cv2.medianBlur(image, 5))(images), images)


def noise(images: Tensor) -> Tensor:
    return (images + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0.0, 1.0)


def without_pneumonia(images: Tensor) -> Tensor:
    """PNEUMONIA images replaced by NORMAL images of other patients."""
    changed, rows = images.clone(), torch.arange(CLASSES.index("PNEUMONIA"), len(images), len(CLASSES))
    changed[rows] = drawn(4000, ["NORMAL"] * len(rows))
    return changed


COPY_MEASURES = {"copies by features", "copies by pixels"}
GATE = {"mmd", "spectrum", "c2st", "recall"}
# change of the samples -> metrics that must detect it, metrics known to miss it
CASES: dict[str, tuple[Change, set[str], set[str]]] = {
    "no change": (lambda images: images, set(), GATE | COPY_MEASURES | {"power ratio", "c2st of spectra"}),
    "blur 0.3 px": (blur(0.3), set(), {"recall", "power ratio"} | COPY_MEASURES),
    "blur 0.5 px": (blur(0.5), {"spectrum", "power ratio", "c2st of spectra"}, COPY_MEASURES),
    "blur 1 px": (blur(1.0), {"mmd", "spectrum", "power ratio", "c2st of spectra"}, COPY_MEASURES),
    "noise": (noise, {"spectrum", "power ratio", "c2st of spectra"}, {"recall"} | COPY_MEASURES),
    "less contrast": (lambda images: 0.5 + 0.8 * (images - 0.5), {"mmd", "spectrum", "power ratio"}, COPY_MEASURES),
    "smoothed ribs": (smoothed_lungs, {"spectrum", "c2st of spectra"}, COPY_MEASURES),
    "one class missing": (
        without_pneumonia,  # an untrained extractor does not recognise classes
        set(),
        {"mmd", "c2st", "recall", "power ratio"} | COPY_MEASURES,
    ),
    "few images again and again": (
        lambda images: images[torch.arange(len(images)) % 5],
        {"mmd", "recall"},
        {"power ratio"} | COPY_MEASURES,
    ),
}
COPIES: dict[str, tuple[Change, set[str], set[str]]] = {
    "exact": (lambda images: images, COPY_MEASURES, GATE),
    "shifted": (lambda images: images.roll((3, 3), (2, 3)), {"copies by pixels"}, GATE),
    "mirrored": (lambda images: images.flip(3), {"copies by pixels"}, GATE),
    "toned": (lambda images: images**0.7, {"copies by pixels"}, GATE),
}


@pytest.mark.slow
@pytest.mark.parametrize(("change", "found", "missed"), CASES.values(), ids=CASES)
def test_faults_are_detected_by_the_expected_metrics(
    sets: ReferenceSets, change: Change, found: set[str], missed: set[str]
) -> None:
    detected = sets.detected_by(change(sets.samples))
    assert found <= detected
    assert not missed & detected


@pytest.mark.slow
@pytest.mark.parametrize(("change", "found", "missed"), COPIES.values(), ids=COPIES)
def test_a_few_copies_are_detected_only_by_the_search_for_copies(
    sets: ReferenceSets, change: Change, found: set[str], missed: set[str]
) -> None:
    samples = sets.samples.clone()
    samples[:NUM_COPIES] = change(sets.train[:NUM_COPIES])
    detected = sets.detected_by(samples)
    assert found <= detected
    assert not missed & detected


@pytest.mark.slow
def test_partial_copies_are_missed(sets: ReferenceSets) -> None:
    """A known limitation: one half is of a train image, the other half is new."""
    samples = sets.samples.clone()
    samples[:NUM_COPIES, ..., :32] = sets.train[:NUM_COPIES, ..., :32]
    assert not sets.detected_by(samples)
