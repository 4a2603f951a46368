"""Evaluate reconstructions of held-out images, by the decoder alone and with the refiner.

Shapes: N images, C channels, H W height and width.
"""

from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from medgen.config import seed_of
from medgen.data.images import StoredImages, join_rows, middle_planes, to_floats
from medgen.evaluation.context import (
    EvaluationContext,
    FeatureSets,
    describe_batch,
    image_set,
    map_rows,
    own_batches,
)
from medgen.metrics import reconstruction
from medgen.metrics.c2st import MIN_GROUPS, linear_auc
from medgen.metrics.comparison import ImageSet
from medgen.metrics.generation import frechet_distance
from medgen.metrics.intervals import group_rows, interval_metrics, mean_interval
from medgen.metrics.latent import active_units, codebook_usage, kl_nats
from medgen.metrics.mmd import mmd, paired_mmd
from medgen.metrics.spectrum import log_power, radial_power, spectrum_metrics
from medgen.models.base import Latent
from medgen.nn.conditions import read_conditions
from medgen.nn.ssim import ssim
from medgen.training.distributed import World

PCA_COMPONENTS = (128, 256, 1024)  # reported in addition to the number of latent dimensions


class Reconstructions(NamedTuple):
    """Scores of the held-out split's reconstructions."""

    ssim: Tensor  # (N,)
    metrics: dict[str, float]


class RefinedReconstructions(NamedTuple):
    """Features of the compared images' reconstructions before and after refinement, and metrics of the refined ones."""

    decoded: ImageSet
    refined: ImageSet
    metrics: dict[str, float]


class _Sums:
    """Sums over a split's images, for metrics that need no value of each image."""

    def __init__(self, context: EvaluationContext) -> None:
        num_frequencies, codebook = min(context.store.plane_shape[1:]) // 2, context.model.codebook
        self.power, self.real_power = (torch.zeros(num_frequencies, dtype=torch.float64) for _ in range(2))
        self.means, self.squares = (torch.zeros(context.model.latent_shape, dtype=torch.float64) for _ in range(2))
        self.kl = torch.zeros(1, dtype=torch.float64)
        self.num_variational = torch.zeros(1, dtype=torch.int64)  # images whose posterior has a variance
        self.codes = torch.zeros(0 if codebook is None else len(codebook), dtype=torch.int64)

    def add(self, originals: Tensor, latent: Latent, images: Tensor) -> None:
        """Add a batch of images (B, C, H, W) as stored, their latents and their reconstructions."""
        self.power += radial_power(middle_planes(images)).double().sum(dim=0)
        self.real_power += radial_power(middle_planes(originals)).double().sum(dim=0)
        if latent.logvar is not None:
            means = latent.mean.double().cpu()
            self.means += means.sum(dim=0)
            self.squares += means.square().sum(dim=0)
            self.kl += kl_nats(latent.mean, latent.logvar).sum().cpu()
            self.num_variational += len(means)
        if latent.codes is not None:
            self.codes += torch.bincount(latent.codes.cpu().flatten(), minlength=len(self.codes))

    def metrics(self, world: World, count: int) -> dict[str, float]:
        """The `latent/` metrics and those of spectra, from the sums of all processes over `count` images."""
        for name, value in vars(self).items():
            setattr(self, name, world.concat(value[None]).sum(dim=0))
        power, real_power = ((total / count).float()[None] for total in (self.power, self.real_power))
        metrics = spectrum_metrics("reconstruction", power, real_power)
        if self.num_variational:  # active units are defined by posterior means
            metrics["latent/active_units"] = active_units(count, self.means, self.squares)
            metrics["latent/kl_nats"] = float(self.kl) / count
        if len(self.codes):
            metrics |= {f"latent/{name}": value for name, value in codebook_usage(self.codes).items()}
        return metrics


def evaluate_reconstructions(context: EvaluationContext) -> Reconstructions:
    """Reconstruct the held-out split with the decoder, batch by batch, and compare it with the originals."""
    names, count = reconstruction.score_names(min(context.store.image_shape[1:])), len(context.held_out)
    batches, sums = own_batches(context.world, count, context.params.batch_size), _Sums(context)

    def score(rows: Tensor) -> Tensor:
        originals, latent, decoded = reconstruct_rows(context, rows)
        sums.add(originals, latent, context.to_stored(decoded))
        return reconstruction.score_images(to_floats(originals), decoded)

    none = torch.empty(0, len(names), dtype=torch.float64)  # all that a process without a batch has
    scores = join_rows(chain([none], map(score, batches)), sum(map(len, batches)))
    columns = dict(zip(names, context.world.concat(scores).unbind(dim=1), strict=True))
    metrics = {f"reconstruction/{name}": float(values.mean()) for name, values in columns.items()}
    metrics |= interval_metrics("reconstruction", {"ssim": mean_interval(columns["ssim"], context.patients)})
    return Reconstructions(columns["ssim"], metrics | sums.metrics(context.world, count))


@torch.no_grad()
def reconstruct_rows(context: EvaluationContext, rows: Tensor) -> tuple[Tensor, Latent, Tensor]:
    """Held-out images (B, C, H, W) as stored, their latents, and their reconstructions, floats on the CPU."""
    originals, labels = StoredImages(context.held_out)[rows], context.labels[rows].to(context.device)
    conditions = None if context.model.space is None else read_conditions(context.held_out, rows)
    latent = context.model.encode(to_floats(originals.to(context.device)), labels, conditions)
    return originals, latent, context.model.decode(latent.mean, labels, conditions).float().cpu()


def refine_rows(context: EvaluationContext, rows: Tensor, decoded: Tensor) -> Tensor:
    """Refined reconstructions (B, C, H, W) of held-out images, without noise on the latents, on the CPU."""
    assert context.refiner is not None
    generator = torch.Generator().manual_seed(seed_of(context.params.seed, 4, int(rows[0])))
    levels, labels = torch.zeros(len(rows), device=context.device), context.labels[rows].to(context.device)
    conditions = None if context.refiner.space is None else read_conditions(context.held_out, rows)
    return context.refiner.refine(decoded.to(context.device), levels, labels, generator, conditions).cpu()


def evaluate_pca(context: EvaluationContext) -> dict[int, float]:
    """SSIM of the compared images by PCA, by number of components, that of the latent dimensions first."""
    train, test = StoredImages(context.store.split("train")), StoredImages(context.held_out, context.compared_rows)
    limit = min(len(train) - 1, train.shape[1:].numel())
    counts = [min(n, limit) for n in (context.num_latent, *PCA_COMPONENTS)]
    return reconstruction.pca_ssim(train, test, counts)


def refine_reconstructions(context: EvaluationContext) -> RefinedReconstructions | None:
    """Reconstruct the compared images and refine them; None without a refiner."""
    if context.refiner is None:
        return None

    def refine(numbers: Tensor) -> Tensor:
        rows = context.compared_rows[numbers]
        originals, _, decoded = reconstruct_rows(context, rows)
        refined, real = refine_rows(context, rows, decoded), to_floats(originals)
        scores = torch.stack([score(real, refined) for score in (ssim, reconstruction.psnr)], dim=1)
        return torch.cat(
            [scores, *(describe_batch(context, context.to_stored(images)) for images in (decoded, refined))], dim=1
        )

    columns = map_rows(context, len(context.compared_rows), refine)
    scores, images = columns.tensor_split([2], dim=1)
    decoded, refined = (image_set(part) for part in images.chunk(2, dim=1))
    means = scores.double().mean(dim=0).tolist()
    return RefinedReconstructions(decoded, refined, dict(zip(("refined/ssim", "refined/psnr"), means, strict=True)))


def evaluate_refiner(
    context: EvaluationContext, features: FeatureSets, reconstructions: RefinedReconstructions, unrefined: ImageSet
) -> dict[str, float]:
    """Metrics that attribute errors to the decoder, the refiner or the prior.

    `decoded/` is for the samples before refinement, `unrefined`, and `refined/` for refined reconstructions;
    `reconstruction/` gets the set distances of the decoder's reconstructions.
    """
    real, groups, bandwidth = features.held_out, context.groups, features.bandwidth
    metrics = spectrum_metrics("decoded", unrefined.power, real.power)
    metrics["decoded/mmd_domain"] = mmd(real.features, unrefined.features, bandwidth, groups).interval.value
    metrics["decoded/fd_domain"] = frechet_distance(real.features, unrefined.features)
    refined = reconstructions.refined
    metrics |= reconstructions.metrics | spectrum_metrics("refined", refined.power, real.power)
    for name, images in {"refined": refined, "reconstruction": reconstructions.decoded}.items():
        metrics[f"{name}/mmd_domain"] = paired_mmd(real.features, images.features, bandwidth, groups)
        metrics[f"{name}/fd_domain"] = frechet_distance(real.features, images.features)
    if len(group_rows(len(real.power), groups)) >= MIN_GROUPS:
        # both sets have the same patients in the same order, so an image and its reconstruction are in the same fold
        auc = linear_auc(log_power(real.power), log_power(refined.power), groups, groups)
        metrics["refined/c2st_auc_spectrum"] = auc.value
        metrics["refined/c2st_auc_domain"] = linear_auc(real.features, refined.features, groups, groups).value
    return metrics
