"""Evaluate samples of the prior against held-out images, and train images for reference.

Shapes: N images, C channels, H W height and width, D features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from medgen.config import seed_of
from medgen.data.images import DTYPES, Images, StoredPlanes, middle_planes, to_stored
from medgen.evaluation.context import (
    MIN_IMAGES,
    EvaluationContext,
    FeatureSets,
    describe_images,
    map_images,
)
from medgen.metrics.c2st import MIN_GROUPS, linear_auc, network_auc
from medgen.metrics.comparison import ImageSet
from medgen.metrics.generation import (
    frechet_distance,
    frechet_interval,
    ms_ssim_diversity,
    prdc,
    prdc_intervals,
    subsample,
)
from medgen.metrics.inception import inception_score
from medgen.metrics.intervals import Groups, Interval, group_rows, interval_metrics, select_groups
from medgen.metrics.mmd import MAX_BANDWIDTH_IMAGES, kid, median_distance, mmd
from medgen.metrics.spectrum import log_power, spectrum_metrics
from medgen.models.base import Decoder
from medgen.nn.conditions import Conditions
from medgen.priors import iterate_samples
from medgen.priors.refiner import Refiner

MIN_CLASS_IMAGES = 20  # held-out images of a class for metrics by class


class Samples(NamedTuple):
    """The evaluated samples as saved images, in the class proportions of the train split."""

    images: Tensor  # (N, C, H, W) as stored, refined if there is a refiner; of volumes the middle planes
    decoded: Tensor | None  # (N, C, H, W) as stored, the same samples before refinement; None without a refiner


@dataclass(frozen=True)
class RecordingRefiner:
    """A refiner that also records the unrefined images, so that one draw from a slow prior gives both."""

    refiner: Refiner
    decoded: list[Tensor]  # batches (B, C, H, W) as stored, of volumes the middle planes, on the CPU
    bits: int  # of a stored grey value

    def sample(
        self,
        decoder: Decoder,
        latents: Tensor,
        labels: Tensor | None,
        generator: torch.Generator,
        conditions: Conditions | None = None,
    ) -> Tensor:
        """See `medgen.priors.ImageRefiner`."""
        planes = middle_planes(decoder.decode(latents, labels, conditions).float().cpu())
        self.decoded.append(to_stored(planes, self.bits))
        return self.refiner.sample(decoder, latents, labels, generator, conditions)


@torch.no_grad()
def draw_samples(context: EvaluationContext) -> Samples:
    """Draw the samples to evaluate.

    Raises:
        UserError: the model, its prior or its refiner gives values that are not finite.
    """
    params, world = context.params, context.world
    bits = context.store.preprocess.bits
    none = torch.empty(0, *context.store.plane_shape, dtype=DTYPES[bits])
    images, decoded = [none], [none]
    for batch, _ in iterate_samples(
        context.prior,
        context.model,
        params.num_generated,
        context.sample_labels,
        params.seed,
        params.batch_size,
        RecordingRefiner(context.refiner, decoded, bits) if context.refiner else None,
        world.rank,
        world.size,
        context.sample_conditions,
    ):
        images.append(to_stored(middle_planes(batch), bits))
    samples = world.concat(torch.cat(images))
    return Samples(samples, world.concat(torch.cat(decoded)) if context.refiner else None)


def describe_sets(context: EvaluationContext, samples: Tensor) -> FeatureSets:
    """Features of samples (N, C, H, W) as stored, reference images and compared images."""
    train = context.store.split("train")
    spread = StoredPlanes(train, subsample(torch.arange(len(train)), min(len(train), MAX_BANDWIDTH_IMAGES)))
    return FeatureSets(
        samples=describe_images(context, samples),
        reference=describe_images(context, context.reference),
        held_out=describe_images(context, context.compared),
        bandwidth=median_distance(describe_images(context, spread).features),
    )


def evaluate_samples(context: EvaluationContext, samples: Tensor, features: FeatureSets) -> dict[str, float]:
    """Metrics of samples (N, C, H, W) as stored against the compared images, with 95 % intervals by patient."""
    groups = context.groups
    intervals = domain_distances(features.samples, features.held_out, features.bandwidth, groups)
    intervals |= prdc_intervals(features.held_out.content, features.samples.content, groups)
    if context.held_out.name == "test":  # a search does not use it, and it trains networks
        sets = (samples, features.samples, context.compared, features.held_out)
        intervals |= classifier_tests(*sets, groups, seed=context.params.seed, device=context.device)
    spectrum = spectrum_metrics("generation", features.samples.power, features.held_out.power)
    return interval_metrics("generation", intervals) | spectrum


def evaluate_reference(context: EvaluationContext, samples: Tensor, features: FeatureSets) -> dict[str, float]:
    """The same metrics of the reference images, and the diversity of samples and compared images."""
    seed, reference, groups = seed_of(context.params.seed), features.reference, context.reference_groups
    sets = (context.reference, reference, context.compared, features.held_out)
    intervals = domain_distances(reference, features.held_out, features.bandwidth, context.groups, groups)
    intervals |= classifier_tests(*sets, context.groups, groups, context.params.seed, context.device)
    metrics = {f"generation/{name}_floor": interval.value for name, interval in intervals.items()}
    spectrum = spectrum_metrics("generation", reference.power, features.held_out.power)
    metrics["generation/spectrum_distance_floor"] = spectrum["generation/spectrum_distance"]
    if context.refiner:
        metrics |= {f"{key}_floor": value for key, value in spectrum.items()}
    metrics["generation/ms_ssim_diversity"] = ms_ssim_diversity(samples, seed=seed)
    metrics["generation/ms_ssim_diversity_real"] = ms_ssim_diversity(context.compared, seed=seed)
    shares = prdc(features.held_out.content, reference.content)._asdict()
    return metrics | {f"generation/{name}_real": value for name, value in shares.items()}


def evaluate_classes(context: EvaluationContext, features: FeatureSets) -> dict[str, float]:
    """Spectrum and MMD of the refined samples of each class against its held-out images; empty without a refiner.

    Classes with fewer than 20 held-out images are left out. Keys contain the index of the class, because MLflow does
    not allow some characters that a class name may contain.
    """
    sample_labels, labels = context.sample_labels, context.labels[context.compared_rows]
    if context.refiner is None or sample_labels is None:
        return {}
    metrics: dict[str, float] = {}
    for label in range(len(context.store.classes)):
        rows, sample_rows = (labels == label).nonzero()[:, 0], (sample_labels == label).nonzero()[:, 0]
        groups = select_groups(context.groups, rows)
        num_smallest = min(len(sample_rows), len(group_rows(len(rows), groups)))
        if len(rows) < MIN_CLASS_IMAGES or num_smallest < MIN_IMAGES:
            continue
        samples, real, prefix = features.samples, features.held_out, f"generation/class_{label}"
        metrics |= spectrum_metrics(prefix, samples.power[sample_rows], real.power[rows])
        distance = mmd(real.features[rows], samples.features[sample_rows], features.bandwidth, groups)
        metrics |= interval_metrics(prefix, {"mmd_domain": distance.interval})
    return metrics


def domain_distances(
    images: ImageSet, held_out: ImageSet, bandwidth: float, groups: Groups, image_groups: Groups = None
) -> dict[str, Interval]:
    """KID, MMD and Fréchet distance of a set from the held-out images by domain features."""
    return {
        "kid_domain": kid(held_out.features, images.features, groups, image_groups),
        "mmd_domain": mmd(held_out.features, images.features, bandwidth, groups, image_groups).interval,
        "fd_domain": frechet_interval(held_out.features, images.features, groups, image_groups),
    }


def classifier_tests(
    images: Images,
    features: ImageSet,
    held_out: Images,
    held_out_features: ImageSet,
    groups: Groups,
    image_groups: Groups = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Interval]:
    """AUC of classifiers of a set against the held-out images, by input and the highest; empty for too few groups.

    Without features (N, 0) there is no classifier by features.
    """
    if min(len(group_rows(len(images), image_groups)), len(group_rows(len(held_out), groups))) < MIN_GROUPS:
        return {}
    power, held_out_power = log_power(features.power), log_power(held_out_features.power)
    intervals = {"spectrum": linear_auc(held_out_power, power, groups, image_groups)}
    if features.features.shape[1]:
        intervals["domain"] = linear_auc(held_out_features.features, features.features, groups, image_groups)
    network_seed = seed_of(seed, 3) % 2**31
    intervals["pixels"] = network_auc(held_out, images, groups, image_groups, network_seed, device)
    highest = max(intervals.values(), key=lambda interval: interval.value)
    return {"c2st_auc": highest} | {f"c2st_auc_{name}": interval for name, interval in intervals.items()}


def network_outputs(context: EvaluationContext, samples: Tensor) -> dict[str, list[Tensor]]:
    """Features by the Inception and local networks of samples, reference images and compared images.

    With the Inception network, `logits` are its class scores of the same images.
    """
    sets: tuple[Images, ...] = (samples, context.reference, context.compared)
    outputs: dict[str, list[Tensor]] = {}
    if inception := context.inception:
        num_features = inception(samples[:1]).features.shape[1]
        for images in sets:
            columns = map_images(context, images, lambda batch: torch.cat(inception(batch), dim=1))
            for name, part in zip(("inception", "logits"), columns.tensor_split([num_features], dim=1), strict=True):
                outputs.setdefault(name, []).append(part)
    if context.local:
        outputs["local"] = [map_images(context, images, context.local) for images in sets]
    return outputs


def evaluate_networks(context: EvaluationContext, outputs: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """Distances by features of the Inception and local networks, and the Inception Score."""
    metrics: dict[str, float] = {}
    for name, sets in outputs.items():
        if name == "logits":
            seed = seed_of(context.params.seed)
            metrics["generation/inception_score"] = inception_score(sets[0], seed)
            metrics["generation/inception_score_real"] = inception_score(sets[2], seed)
        else:
            metrics |= network_distances(context, name, sets)
    return metrics


def network_distances(context: EvaluationContext, name: str, features: Sequence[Tensor]) -> dict[str, float]:
    """KID, MMD and Fréchet distance from the held-out images, of samples and of train images for reference.

    `features` (N, D) are of samples, reference and compared images; `name` is the network's, in the metric keys. The
    Fréchet distance has no interval, which would take a hundred eigendecompositions of 2,048 features.
    """
    samples, train, held_out = features
    groups, train_groups = context.groups, context.reference_groups
    bandwidth = median_distance(train)
    intervals = {
        f"kid_{name}": kid(held_out, samples, groups),
        f"mmd_{name}": mmd(held_out, samples, bandwidth, groups).interval,
    }
    values = {
        f"fd_{name}": frechet_distance(held_out, samples),
        f"fd_{name}_floor": frechet_distance(held_out, train),
        f"kid_{name}_floor": kid(held_out, train, groups, train_groups).value,
        f"mmd_{name}_floor": mmd(held_out, train, bandwidth, groups, train_groups).interval.value,
    }
    return interval_metrics("generation", intervals) | {f"generation/{key}": value for key, value in values.items()}
