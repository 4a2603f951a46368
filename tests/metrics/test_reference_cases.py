"""Faults of known kind in drawn radiographs: which measures find each, and which are known to miss it.

A drawn image of another patient is a perfect sample. Features come from untrained convolutions, so that the tests
need no training; benchmarks/measures.py has the same cases with the trained extractor (docs/measures.md).
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


class Views:
    """The drawn sets, and how the measures see them."""

    def __init__(self) -> None:
        self.train, self.held_out, self.champion, self.samples = (drawn(1000 * part) for part in range(4))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.extractor = DomainExtractor(ExtractorSizes(1, 64, 16, len(CLASSES))).eval()
        with torch.no_grad():
            self.extractor.standardise([self.train], [self.train])
        self.bandwidth = median_distance(self.view(self.train).features)

    @torch.no_grad()
    def view(self, images: Tensor) -> ImageSet:
        return ImageSet(self.extractor(images), radial_power(images))

    def found_by(self, samples: Tensor) -> set[str]:
        """Measures by which these samples are worse than the champion's, unlike real images, or copies."""
        own, champion, held_out = (self.view(images) for images in (samples, self.champion, self.held_out))
        tests = compare(own, champion, held_out, self.bandwidth, num_permutations=199)
        found = {one.name for one in tests if one.p < 0.05}
        if not 0.8 < band_ratios(own.power, held_out.power)[-1] < 1.25:
            found.add("power ratio")
        if linear_auc(log_power(held_out.power), log_power(own.power)).low > 0.55:
            found.add("c2st of spectra")
        train = self.view(self.train).content
        for name, nearest, images in (
            ("copies by features", privacy.nearest_by_features, [v.content for v in (own, held_out)]),
            ("copies by pixels", privacy.nearest_by_pixels, [samples, self.held_out]),
        ):
            reference = train if name.endswith("features") else self.train
            copies = privacy.find_copies(*(nearest(part, reference) for part in images))
            if copies.rate > copies.plausible or float(copies.nearness.min()) < privacy.CERTAIN:
                found.add(name)
        return found


@pytest.fixture(scope="module")
def views() -> Views:
    return Views()


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
    """Other patients' NORMAL images in their place."""
    changed, rows = images.clone(), torch.arange(CLASSES.index("PNEUMONIA"), len(images), len(CLASSES))
    changed[rows] = drawn(4000, ["NORMAL"] * len(rows))
    return changed


COPY_MEASURES = {"copies by features", "copies by pixels"}
GATE = {"mmd", "spectrum", "c2st", "recall"}
# samples changed -> measures that must find it, measures known to miss it
CASES: dict[str, tuple[Change, set[str], set[str]]] = {
    "no change": (lambda images: images, set(), GATE | COPY_MEASURES | {"power ratio", "c2st of spectra"}),
    "blur 0.3 px": (blur(0.3), set(), {"recall", "power ratio"} | COPY_MEASURES),
    "blur 0.5 px": (blur(0.5), {"spectrum", "power ratio", "c2st of spectra"}, COPY_MEASURES),
    "blur 1 px": (blur(1.0), {"mmd", "spectrum", "power ratio", "c2st of spectra"}, COPY_MEASURES),
    "noise": (noise, {"spectrum", "power ratio", "c2st of spectra"}, {"recall"} | COPY_MEASURES),
    "less contrast": (lambda images: 0.5 + 0.8 * (images - 0.5), {"mmd", "spectrum", "power ratio"}, COPY_MEASURES),
    "smoothed ribs": (smoothed_lungs, {"spectrum", "c2st of spectra"}, COPY_MEASURES),
    "one class missing": (
        without_pneumonia,  # untrained features know no classes
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
def test_faults_are_found_by_these_measures(views: Views, change: Change, found: set[str], missed: set[str]) -> None:
    seen = views.found_by(change(views.samples))
    assert found <= seen
    assert not missed & seen


@pytest.mark.slow
@pytest.mark.parametrize(("change", "found", "missed"), COPIES.values(), ids=COPIES)
def test_a_few_copies_are_found_only_by_the_search_for_them(
    views: Views, change: Change, found: set[str], missed: set[str]
) -> None:
    samples = views.samples.clone()
    samples[:NUM_COPIES] = change(views.train[:NUM_COPIES])
    seen = views.found_by(samples)
    assert found <= seen
    assert not missed & seen


@pytest.mark.slow
def test_copies_in_part_are_missed(views: Views) -> None:
    """The known hole: one half of a train image, the other half new."""
    samples = views.samples.clone()
    samples[:NUM_COPIES, ..., :32] = views.train[:NUM_COPIES, ..., :32]
    assert not views.found_by(samples)
