"""Evaluate images of any origin against real ones: `medgen.evaluate` of the Python API.

medgen.evaluate(images, dataset.split("test"), train=dataset.split("train"), extractor="artifacts/features")

Shapes: N images, C channels, H W height and width.
"""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from medgen.data.arrays import check_images
from medgen.data.images import Images, StoredPlanes, maximum, middle_planes, split_images, to_floats, to_stored
from medgen.data.store import Split
from medgen.errors import UserError
from medgen.evaluation.context import MAX_HELD_OUT, extract_features
from medgen.evaluation.generation import classifier_tests, domain_distances
from medgen.metrics.c2st import MIN_GROUPS
from medgen.metrics.comparison import ImageSet
from medgen.metrics.features import DomainExtractor, load_extractor
from medgen.metrics.generation import prdc, prdc_intervals, subsample
from medgen.metrics.intervals import Groups, Interval, group_rows, interval_metrics, select_groups
from medgen.metrics.mmd import MAX_BANDWIDTH_IMAGES, median_distance
from medgen.metrics.spectrum import radial_power, spectrum_metrics
from medgen.training.distributed import pick_device

MIN_SIDE, MIN_EXTRACTOR_SIDE = 16, 32  # pixels
BATCH_SIZE = 64


class _CheckedImages(NamedTuple):
    """A set of images."""

    pixels: Images  # (N, C, H, W) uint8 or uint16
    groups: Groups  # patient of each image

    def subsample(self, most: int) -> "_CheckedImages":
        """At most so many of the images, spread evenly, in memory."""
        rows = subsample(torch.arange(len(self.pixels)), min(len(self.pixels), most))
        return _CheckedImages(self.pixels[rows], select_groups(self.groups, rows))


class _MeasuredImages(NamedTuple):
    """A set of images with its features (N, 0 without an extractor) and spectra."""

    pixels: Images  # (N, C, H, W) uint8 or uint16
    measured: ImageSet
    groups: Groups  # patient of each image


def evaluate(
    images: NDArray[Any] | Split,
    reference: NDArray[Any] | Split,
    *,
    train: NDArray[Any] | Split | None = None,
    extractor: str | Path | None = None,
    patients: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Metrics of a set of images of any origin against a set of real images.

    Images are arrays (N, C, H, W), grey (N, H, W) or volumes (N, 1, D, H, W), uint8 from 0 to 255, uint16 from 0 to
    65535 or floats from 0 to 1, or a split of a dataset. Volumes are compared by their three middle planes. All are
    rounded to as many grey values as the reference images have, 256 if these are floats. The values are those of
    `medgen evaluate` for the same images.

    Args:
        images: the images to evaluate, such as a model's samples.
        reference: real images that the model was not trained on, such as the test split; of more than 10,000, as many
            are used, spread evenly.
        train: the images that the model was trained on. They add the references KEY_floor (KEY_real of precision …
            coverage), which are the same metrics of train images, and they set the bandwidth of `mmd_domain`; without
            them the reference images do.
        extractor: folder of a domain extractor, such as "artifacts/features". It adds the metrics by features: MMD,
            KID, Fréchet distance, precision, recall, density and coverage, and a classifier by features.
        patients: patient of each reference image, for intervals and folds by patient, if `reference` is an array. A
            split has its own. None: each image is a patient.
        seed: seed of the classifier on pixels.

    Returns:
        Metrics by their key in reports/metrics.json, such as generation/spectrum_distance (docs/contract.md): all keys
            that compare samples with test images.

    Raises:
        UserError: an array has another type, shape or range, a set has fewer than 10 images (or patients), or the
            extractor is missing, damaged or made for other channels.
    """
    network = None if extractor is None else load_extractor(Path(extractor))[0].to(pick_device("auto"))
    checked = _check(reference, "reference", network, None, patients)
    real = _measure(checked.subsample(MAX_HELD_OUT) if len(checked.pixels) > MAX_HELD_OUT else checked, network)
    shape = (real.pixels.shape[1], real.pixels.shape[2], real.pixels.shape[3])
    bits = 16 if maximum(real.pixels) > 255 else 8
    own = _measure(_check(images, "images", network, shape, bits=bits), network)
    trained_on = None if train is None else _check(train, "train", network, shape, bits=bits)
    bandwidth = None
    if network is not None:
        features = real.measured.features
        if trained_on is not None:
            features = _measure(trained_on.subsample(MAX_BANDWIDTH_IMAGES), network).measured.features
        bandwidth = median_distance(features)
    intervals = _compare(own, real, bandwidth, seed)
    if network is not None:
        intervals |= prdc_intervals(real.measured.content, own.measured.content, real.groups, own.groups)
    spectrum = spectrum_metrics("generation", own.measured.power, real.measured.power)
    metrics = interval_metrics("generation", intervals) | spectrum
    if trained_on is not None:
        metrics |= _reference_metrics(_measure(trained_on.subsample(len(own.pixels)), network), real, bandwidth, seed)
    return metrics


def _reference_metrics(
    train: _MeasuredImages, real: _MeasuredImages, bandwidth: float | None, seed: int
) -> dict[str, float]:
    """The metrics of train images, with the keys of references."""
    spectrum = spectrum_metrics("generation", train.measured.power, real.measured.power)
    values = {f"generation/{name}": interval.value for name, interval in _compare(train, real, bandwidth, seed).items()}
    metrics = {f"{key}_floor": value for key, value in (values | spectrum).items()}
    if bandwidth is not None:
        shares = prdc(real.measured.content, train.measured.content)._asdict()
        metrics |= {f"generation/{name}_real": value for name, value in shares.items()}
    return metrics


def _compare(images: _MeasuredImages, real: _MeasuredImages, bandwidth: float | None, seed: int) -> dict[str, Interval]:
    """Classifier tests, and with a bandwidth distances by features."""
    sets = (images.pixels, images.measured, real.pixels, real.measured)
    intervals = classifier_tests(*sets, real.groups, images.groups, seed, pick_device("auto"))
    if bandwidth is not None:
        intervals |= domain_distances(images.measured, real.measured, bandwidth, real.groups, images.groups)
    return intervals


def _check(
    images: NDArray[Any] | Split,
    name: str,
    network: DomainExtractor | None,
    shape: tuple[int, int, int] | None,
    patients: Sequence[Hashable] | None = None,
    bits: int | None = None,
) -> _CheckedImages:
    """Check a set of images; those of a split are read where they are used.

    `bits` of a grey value are those of the images to compare with; None keeps the images' own, 8 for floats.
    """
    given = StoredPlanes(images)[:1].numpy() if isinstance(images, Split) else np.asarray(images)
    if given.ndim == 5 and given.dtype.kind in "uf":
        given = middle_planes(torch.from_numpy(given)).numpy()
    array = check_images(given, name, shape)
    own_bits = 16 if array.dtype == "uint16" else 8
    pixels: Images
    if isinstance(images, Split):
        pixels = StoredPlanes(images)
        if bits not in (None, own_bits):
            raise UserError(f"{name}: found a dataset of {own_bits} bits; expected {bits}, as the reference images")
    else:
        pixels = to_stored(to_floats(torch.from_numpy(array)), bits or own_bits)
    groups = images.patients if isinstance(images, Split) else patients
    if groups is not None and len(groups) != len(pixels):
        raise UserError(f"patients: found {len(groups)}; expected one for each of the {len(pixels)} images in {name}")
    num_groups = len(group_rows(len(pixels), groups))
    if num_groups < MIN_GROUPS:
        unit = "images" if groups is None else "patients"
        raise UserError(f"{name}: found {num_groups} {unit}; expected at least {MIN_GROUPS}, better hundreds")
    side, needed = min(pixels.shape[2:]), MIN_SIDE if network is None else MIN_EXTRACTOR_SIDE
    if side < needed:
        raise UserError(f"{name}: found images with a side of {side} pixels; expected at least {needed}")
    if network is not None and network.sizes.image_channels != pixels.shape[1]:
        raise UserError(
            f"{name}: found {pixels.shape[1]} channels; expected {network.sizes.image_channels}, as the extractor's "
            "train images"
        )
    return _CheckedImages(pixels, groups)


def _measure(images: _CheckedImages, network: DomainExtractor | None) -> _MeasuredImages:
    """Compute the features and spectra of a set of images."""
    pixels = images.pixels
    features = torch.empty(len(pixels), 0) if network is None else extract_features(network, pixels, BATCH_SIZE)
    power = torch.cat([radial_power(part) for part in split_images(pixels, BATCH_SIZE)])
    return _MeasuredImages(pixels, ImageSet(features, power), images.groups)
