"""Evaluate reconstructions of held-out images, by the decoder alone and with the refiner.

Shapes: N images, C channels, H W height and width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from medgen.config import seed_of
from medgen.evaluation.context import EvaluationContext, FeatureSets, describe_images, to_uint8
from medgen.metrics import latent, reconstruction
from medgen.metrics.c2st import MIN_GROUPS, linear_auc
from medgen.metrics.generation import frechet_distance
from medgen.metrics.intervals import group_rows, interval_metrics, mean_interval
from medgen.metrics.mmd import mmd, paired_mmd
from medgen.metrics.spectrum import log_power, radial_power, spectrum_metrics
from medgen.training.loader import Loader

PCA_COMPONENTS = (128, 256, 1024)  # reported in addition to the number of latent dimensions


class Reconstructions(NamedTuple):
    """Reconstructions of the held-out split and their metrics."""

    images: Tensor  # (N, C, H, W) uint8
    ssim: Tensor  # (N,)
    metrics: dict[str, float]
    latents: Tensor | None = None  # (N, *latent_shape) posterior means; not for refined reconstructions


@torch.no_grad()
def evaluate_reconstructions(context: EvaluationContext) -> Reconstructions:
    """Reconstruct the held-out split with the decoder and compare it with the originals."""
    originals, results, means, divergences, codes = [], [], [], [], []
    for batch in Loader(context.held_out, context.params.batch_size, context.device).sequential():
        encoded = context.model.encode(batch.image, batch.label)
        originals.append(batch.image.cpu())
        results.append(context.model.decode(encoded.mean, batch.label).float().cpu())
        means.append(encoded.mean.cpu())
        if encoded.logvar is not None:
            divergences.append(latent.kl_nats(encoded.mean, encoded.logvar).cpu())
        if encoded.codes is not None:
            codes.append(encoded.codes.cpu())
    scores = reconstruction.score_images(zip(originals, results, strict=True))
    metrics = {f"reconstruction/{name}": float(values.mean()) for name, values in scores.items()}
    ssim = mean_interval(scores["ssim"], context.held_out.patients)
    metrics |= interval_metrics("reconstruction", {"ssim": ssim})
    images = torch.cat([to_uint8(result) for result in results])
    metrics |= spectrum_metrics("reconstruction", radial_power(images), radial_power(torch.cat(originals)))
    if divergences:  # a variational model; active units are defined by its posterior means
        metrics["latent/active_units"] = latent.active_units(torch.cat(means))
        metrics["latent/kl_nats"] = float(torch.cat(divergences).mean())
    if codes:
        usage = latent.codebook_use(torch.cat(codes), context.info.model.num_embeddings)
        metrics |= {f"latent/{name}": value for name, value in usage.items()}
    return Reconstructions(images, scores["ssim"], metrics, torch.cat(means))


def evaluate_pca(context: EvaluationContext, train: Tensor, test: Tensor) -> dict[int, float]:
    """SSIM of PCA by number of components, that of the latent dimensions first; images (N, C, H, W) uint8."""
    limit = min(len(train) - 1, test[0].numel())
    return reconstruction.pca_ssim(train, test, [min(n, limit) for n in (context.num_latent, *PCA_COMPONENTS)])


def refine_reconstructions(context: EvaluationContext) -> Reconstructions | None:
    """Refined reconstructions of the held-out split, without noise on the latents; None without a refiner."""
    if context.refiner is None:
        return None
    generator = torch.Generator().manual_seed(seed_of(context.params.seed, 4))
    originals, results = [], []
    for batch in Loader(context.held_out, context.params.batch_size, context.device).sequential():
        with torch.no_grad():
            decoded = context.model.reconstruct(batch.image, batch.label).float()
        levels = torch.zeros(len(decoded), device=decoded.device)
        originals.append(batch.image.cpu())
        results.append(context.refiner.refine(decoded, levels, batch.label, generator).cpu())
    scores = reconstruction.score_images(zip(originals, results, strict=True))
    metrics = {f"refined/{name}": float(scores[name].mean()) for name in ("ssim", "psnr")}
    return Reconstructions(torch.cat([to_uint8(result) for result in results]), scores["ssim"], metrics)


def evaluate_refiner(
    context: EvaluationContext,
    features: FeatureSets,
    reconstructions: Reconstructions,
    refined: Reconstructions | None,
    decoded: Tensor | None,
) -> dict[str, float]:
    """Metrics that attribute errors to the decoder, the refiner or the prior; empty without a refiner.

    `decoded/` is for samples before refinement, which are in `decoded` (N, C, H, W) uint8, and `refined/` for refined
    reconstructions; `reconstruction/` gets the set distances of the decoder's reconstructions.
    """
    if refined is None or decoded is None:
        return {}
    unrefined, real = describe_images(context, decoded), features.held_out
    groups, bandwidth = context.held_out.patients, features.bandwidth
    metrics = spectrum_metrics("decoded", unrefined.power, real.power)
    metrics["decoded/mmd_domain"] = mmd(real.features, unrefined.features, bandwidth, groups).interval.value
    metrics["decoded/fd_domain"] = frechet_distance(real.features, unrefined.features)
    refined_set = describe_images(context, refined.images)
    metrics |= refined.metrics | spectrum_metrics("refined", refined_set.power, real.power)
    sets = {"refined": refined_set, "reconstruction": describe_images(context, reconstructions.images)}
    for name, images in sets.items():
        metrics[f"{name}/mmd_domain"] = paired_mmd(real.features, images.features, bandwidth, groups)
        metrics[f"{name}/fd_domain"] = frechet_distance(real.features, images.features)
    if len(group_rows(len(real.power), groups)) >= MIN_GROUPS:
        # both sets have the same patients in the same order, so an image and its reconstruction are in the same fold
        auc = linear_auc(log_power(real.power), log_power(refined_set.power), groups, groups)
        metrics["refined/c2st_auc_spectrum"] = auc.value
        metrics["refined/c2st_auc_domain"] = linear_auc(real.features, refined_set.features, groups, groups).value
    return metrics
