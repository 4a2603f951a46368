"""The parts of an evaluation, loaded and checked: model, prior, refiner, data and feature networks.

Shapes: N images, C channels, H W height and width, D features, R radial frequencies.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from medgen.config import Evaluate, Project, unknown_name
from medgen.console import warn
from medgen.data.images import (
    Images,
    StoredPlanes,
    join_rows,
    middle_planes,
    side_by_side,
    split_images,
    to_floats,
    to_stored,
)
from medgen.data.store import Split, Store
from medgen.datasets.weights import WEIGHTS, checked_weights
from medgen.errors import UserError
from medgen.metrics.comparison import ImageSet
from medgen.metrics.features import NUM_FEATURES, DomainExtractor, load_extractor, unrecognised_classes
from medgen.metrics.generation import subsample
from medgen.metrics.inception import Inception, load_inception
from medgen.metrics.intervals import Groups, select_groups
from medgen.metrics.local_network import LocalNetwork, load_local_network
from medgen.metrics.spectrum import radial_power
from medgen.models import GenerativeModel, bundle
from medgen.models.bundle import BundleInfo
from medgen.nn.conditions import StoredConditions
from medgen.priors import Prior, is_conditional, load_prior, takes_conditions
from medgen.priors.refiner import Refiner, load_refiner
from medgen.training.distributed import World

MIN_IMAGES = 3  # in each set: KID needs two images after one is left out
MAX_HELD_OUT = 10_000  # compared with samples; of a larger split, images spread evenly over it


@dataclass(frozen=True)
class EvaluationContext:
    """A generative model with the data, networks and settings to evaluate it."""

    store: Store
    held_out: Split  # test, or val during a search
    model: GenerativeModel
    info: BundleInfo
    prior: Prior
    refiner: Refiner | None
    extractor: DomainExtractor
    extractor_sha256: str
    unrecognised: tuple[str, ...]  # classes that the extractor does not recognise
    inception: Inception | None  # None if it is not configured or its weights are missing
    local: LocalNetwork | None
    world: World
    params: Evaluate

    @property
    def device(self) -> torch.device:
        """Device of all networks."""
        return self.world.device

    def to_stored(self, images: Tensor) -> Tensor:
        """Floats in [0, 1] as the dataset stores images; raises as `medgen.data.images.to_stored`."""
        return to_stored(images, self.store.preprocess.bits)

    def to_drawn(self, samples: Tensor) -> Tensor:
        """Evaluated samples as figures show them: planes of volumes side by side."""
        return side_by_side(samples, self.store.image_shape[0]) if self.store.preprocess.has_volumes else samples

    @cached_property
    def compared_rows(self) -> Tensor:
        """Rows of the held-out images that samples are compared with."""
        return subsample(torch.arange(len(self.held_out)), min(len(self.held_out), MAX_HELD_OUT))

    @property
    def compared(self) -> StoredPlanes:
        """The held-out images, or planes of volumes, that samples are compared with."""
        return StoredPlanes(self.held_out, self.compared_rows)

    @cached_property
    def patients(self) -> Groups:
        """Patient of each held-out image."""
        return self.held_out.patients  # reads the manifest

    @cached_property
    def groups(self) -> Groups:
        """Patient of each compared image."""
        return select_groups(self.patients, self.compared_rows)

    @cached_property
    def labels(self) -> Tensor:
        """Label of each held-out image."""
        return labels_of(self.held_out)

    @cached_property
    def reference_rows(self) -> Tensor:
        """Rows of up to `num_generated` train images, spread evenly, which are compared as the samples are."""
        count = self.store.counts["train"]
        return subsample(torch.arange(count), min(count, self.params.num_generated))

    @property
    def reference(self) -> StoredPlanes:
        """The train images of `reference_rows`, or their planes."""
        return StoredPlanes(self.store.split("train"), self.reference_rows)

    @cached_property
    def reference_groups(self) -> Groups:
        """Patient of each reference image."""
        return select_groups(self.store.split("train").patients, self.reference_rows)

    @property
    def num_latent(self) -> int:
        """Number of latent dimensions; with a codebook, of code indices, which determine the codes' vectors."""
        shape = self.model.latent_shape
        return math.prod(shape if self.model.codebook is None else shape[1:])

    @property
    def normal_class(self) -> int | None:
        """Index of evaluate.normal_class; None without one."""
        name = self.params.normal_class
        return None if name is None else self.store.classes.index(name)

    @property
    def conditional(self) -> bool:
        """True if a label changes the generated images."""
        return is_conditional(self.prior, self.model)

    @property
    def sample_labels(self) -> Tensor | None:
        """Label (num_generated,) of each evaluated sample, in the class proportions of the train split."""
        if not self.conditional:
            return None
        return proportional_labels(self.prior.frequencies, self.params.num_generated)

    @property
    def sample_conditions(self) -> StoredConditions | None:
        """Conditions of each evaluated sample; None without any."""
        return self.conditions_of(self.sample_labels, self.params.num_generated)

    def conditions_of(self, labels: Tensor | None, n: int) -> StoredConditions | None:
        """Conditions of `n` samples with labels (n,): those of held-out images of the class in turn; None without any.

        Those of train images would invite copies of the images that have exactly these conditions.
        """
        if not takes_conditions(self.prior, self.model):
            return None
        return StoredConditions(self.held_out, matching_rows(self.labels, labels, n))

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the weights of each feature network."""
        hashes = {"domain": self.extractor_sha256}
        if self.inception:
            hashes["inception"] = WEIGHTS["inception"].sha256
        if self.local:
            hashes["local"] = self.local.params.sha256
        return hashes


class FeatureSets(NamedTuple):
    """Domain features (N, 128) and radial power (N, R) of sets of images."""

    samples: ImageSet
    reference: ImageSet  # up to `num_generated` train images
    held_out: ImageSet  # the compared images
    bandwidth: float  # of the RBF kernel, the same for all models of this dataset and extractor


def load_context(
    project: Project,
    store: Store,
    model: GenerativeModel,
    info: BundleInfo,
    evaluate: Evaluate,
    world: World,
    split: str = "test",
) -> EvaluationContext:
    """Load the other parts of an evaluation.

    Raises:
        UserError: a part is missing or damaged, parts do not belong together, or a set is too small.
    """
    device = world.device
    weights = bundle.digest(project.model)
    prior = load_prior(project.prior, weights, device)
    refiner = load_refiner(project.refiner, weights, device)
    extractor, digest = load_extractor(project.features, store.fingerprint)
    for name in ("train", split):
        if store.counts[name] < MIN_IMAGES:
            raise UserError(
                f"{project.dataset}: {store.counts[name]} images in the {name} split, expected at least {MIN_IMAGES}; "
                f"change preprocess.{split}_fraction or add images"
            )
    if evaluate.num_generated < MIN_IMAGES:
        raise UserError(f"evaluate.num_generated: found {evaluate.num_generated}, expected at least {MIN_IMAGES}")
    if evaluate.normal_class is not None and evaluate.normal_class not in store.classes:
        raise unknown_name("evaluate.normal_class", evaluate.normal_class, store.classes)
    return EvaluationContext(
        store=store,
        held_out=store.split(split),
        model=model,
        info=info,
        prior=prior,
        refiner=refiner,
        extractor=extractor.to(device),
        extractor_sha256=digest,
        unrecognised=unrecognised_classes(project.features),
        inception=find_inception(evaluate, device),
        local=find_local_network(evaluate, project.root, device),
        world=world,
        params=evaluate,
    )


def find_inception(params: Evaluate, device: torch.device) -> Inception | None:
    """The Inception network if evaluate.extractors has it; None with a warning if its weights are missing."""
    if "inception" not in params.extractors:
        return None
    try:
        return load_inception(checked_weights("inception")).to(device)
    except UserError as error:
        warn(f"no Inception Score and no FID: {error}")
        return None


def find_local_network(params: Evaluate, root: Path, device: torch.device) -> LocalNetwork | None:
    """The network that evaluate.local describes, if evaluate.extractors has it."""
    if "local" not in params.extractors or params.local is None:
        return None
    return load_local_network(params.local, root).to(device)


def describe_images(context: EvaluationContext, images: Images) -> ImageSet:
    """Domain features and radial power of images (N, C, H, W) as stored."""
    return image_set(map_images(context, images, lambda batch: describe_batch(context, batch)))


def describe_batch(context: EvaluationContext, images: Tensor) -> Tensor:
    """Features and radial power of images (B, C, H, W) as stored side by side, for `image_set`: (B, 128 + R)."""
    images = middle_planes(images)
    return torch.cat([extract_features(context.extractor, images, len(images)), radial_power(images)], dim=1)


def image_set(columns: Tensor) -> ImageSet:
    """The set of images whose features and power `describe_batch` gives."""
    return ImageSet(*(part.contiguous() for part in columns.tensor_split([NUM_FEATURES], dim=1)))


def map_images(context: EvaluationContext, images: Images, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`map_rows` of a function of each batch of images."""
    return map_rows(context, len(images), lambda rows: function(images[rows]))


def map_rows(context: EvaluationContext, count: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Rows (count, ...) that `function` gives for each batch of row numbers, on the CPU; processes share the batches.

    Every process gets all rows.
    """
    batches = own_batches(context.world, count, context.params.batch_size)
    if not batches:  # more processes than batches; the first row gives the shape
        return context.world.concat(function(torch.arange(1))[:0])
    return context.world.concat(join_rows(map(function, batches), sum(map(len, batches))))


def own_batches(world: World, count: int, batch_size: int) -> Sequence[Tensor]:
    """Row numbers of each batch of this process; all processes together have the batches of one process."""
    batches = torch.split(torch.arange(count), batch_size)
    return batches[own_share(world, len(batches))]


def own_share(world: World, count: int) -> slice:
    """This process's part of `count` items."""
    return slice(world.rank * count // world.size, (world.rank + 1) * count // world.size)


@torch.no_grad()
def extract_features(extractor: DomainExtractor, images: Images, batch_size: int) -> Tensor:
    """Domain features (N, 128), on the CPU, of images (N, C, H, W) as stored."""
    device = extractor.mean.device
    parts = split_images(images, batch_size)
    return join_rows((extractor(to_floats(part.to(device))).cpu() for part in parts), len(images))


def labels_of(split: Split) -> Tensor:
    """Labels (N,) int64 of a split, in memory."""
    return torch.from_numpy(np.array(split.labels[:]))


def matching_rows(labels: Tensor, wanted: Tensor | None, n: int) -> Tensor:
    """Rows (n,) of images with labels (N,) that have the `wanted` labels (n,), in turn; -1 where no image has it.

    Without `wanted`, all images come in turn.
    """
    if wanted is None:
        return torch.arange(n) % len(labels)
    rows = torch.full((n,), -1)
    for label in sorted(set(wanted.tolist())):
        own, places = (labels == label).nonzero()[:, 0], (wanted == label).nonzero()[:, 0]
        if len(own):
            rows[places] = own[torch.arange(len(places)) % len(own)]
    return rows


def proportional_labels(frequencies: Tensor, n: int) -> Tensor:
    """`n` sorted labels in proportion to `frequencies` (K,), rounded by largest remainder."""
    exact = frequencies.double() / frequencies.sum() * n
    counts = exact.floor().long()
    remainder = (exact - counts).argsort(descending=True, stable=True)[: n - int(counts.sum())]
    counts[remainder] += 1
    return torch.repeat_interleave(torch.arange(len(counts)), counts)
