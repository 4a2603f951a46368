"""Loss terms, and the objective that weights them.

Every image term is a mean over pixels. KL is logged in nats per image and weighted as β·KL/(C·H·W), so that with the
pixel mean of a log-likelihood β = 1 is the evidence lower bound. Volumes count as images with D·H·W pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medgen.config import Beta, Loss, Weights
from medgen.models.base import Latent, ModelOutput
from medgen.nn.parallel import mean_over_processes, sum_over_processes
from medgen.nn.ssim import ssim

VGG16_LAYERS = (3, 8, 15)  # relu1_2, relu2_2, relu3_3
TERM_WEIGHTS = {"commitment": "commitment_cost"}  # term of a model -> its weight in `loss`; others have weight 1


@dataclass(frozen=True)
class Losses:
    """The loss with its gradient, and detached, unweighted scalars to log."""

    total: Tensor
    terms: dict[str, Tensor]


class Objective(nn.Module):
    """Weighted loss of a model's output, for every model family.

    Args:
        loss: weights and conventions; a phase may replace the weights.
        image_shape: (C, H, W) or (C, D, H, W), for the effective β that is logged.
        vgg16: file of torchvision's VGG16 weights, needed if the perceptual weight is not zero.
    """

    def __init__(self, loss: Loss, image_shape: tuple[int, ...], vgg16: Path | None = None) -> None:
        super().__init__()
        self.loss = loss
        self.num_pixels = math.prod(image_shape)
        self.perceptual = None if vgg16 is None else PerceptualDistance(vgg16)

    def forward(self, output: ModelOutput, target: Tensor, weights: Weights, beta: float) -> Losses:
        """Total loss and its named terms; `target` is the batch's images (B, C, H, W) or masks (B, K, H, W)."""
        image, latent = self.image_loss(output.prediction, target, weights), self.latent_loss(output, beta)
        return Losses(image.total + latent.total, image.terms | latent.terms)

    def image_loss(self, reconstruction: Tensor, target: Tensor, weights: Weights) -> Losses:
        """Terms that compare the model's output with `target`."""
        terms: dict[str, Tensor] = {}
        total = target.new_zeros(())
        for name, weight in weights.model_dump().items():
            if weight > 0:
                term = self._image_term(name, reconstruction.float(), target)
                # not "ssim", since the term is 1 - SSIM
                terms[f"{name}_loss" if name in ("ssim", "dice") else name] = term.detach()
                total = total + weight * term
        return Losses(total, terms)

    def latent_loss(self, output: ModelOutput, beta: float) -> Losses:
        """Terms of the latent: KL weighted by `beta`, commitment, codebook; 0 for a model without them."""
        terms: dict[str, Tensor] = {}
        total = output.prediction.new_zeros((), dtype=torch.float32)
        if output.latent is not None and output.latent.logvar is not None:
            kl = kl_per_dim(output.latent)
            terms["kl"] = kl.flatten(1).sum(dim=1).mean().detach()
            # β = 0 leaves KL out of the graph: 0 · inf would be NaN
            if beta > 0:
                weight = self.kl_weight(beta, kl[0].numel(), output.prediction[0].numel())
                total = total + weight * free_bits(kl, self.loss.free_bits)
        for name, term in output.terms.items():
            terms[name] = term.detach()
            weight = getattr(self.loss, TERM_WEIGHTS[name]) if name in TERM_WEIGHTS else 1.0
            total = total + weight * term
        return Losses(total, terms)

    def kl_weight(self, beta: float, latent_numel: int, num_pixels: int) -> float:
        """Factor of KL in nats per image, by `loss.kl_reduction`; a patch of an image counts as an image."""
        return {"elbo": beta / num_pixels, "sum": beta, "mean": beta / latent_numel}[self.loss.kl_reduction]

    def effective_beta(self, beta: float, latent_numel: int) -> float:
        """β on the scale where 1 is the evidence lower bound, for any `kl_reduction`.

        A weight of 0.003 on a summed KL with a pixel mean is 49 at 128 px on this scale.
        """
        return self.kl_weight(beta, latent_numel, self.num_pixels) * self.num_pixels

    def _image_term(self, name: str, reconstruction: Tensor, image: Tensor) -> Tensor:
        if name == "perceptual":
            if self.perceptual is None:
                raise ValueError("a perceptual weight needs the VGG16 weights")
            return self.perceptual(reconstruction, image)  # type: ignore[no-any-return]
        return IMAGE_TERMS[name](reconstruction, image)


def ssim_loss(reconstruction: Tensor, image: Tensor) -> Tensor:
    """1 - SSIM, mean over a batch of images in [0, 1]."""
    return 1.0 - ssim(image, reconstruction).mean()


def sigma_loss(reconstruction: Tensor, image: Tensor) -> Tensor:
    """Negative log-likelihood per pixel, up to a constant, under a Gaussian with the optimal variance, the MSE.

    σ-VAE (Rybkin et al. 2021, eq. 6): with β = 1 the sum is an evidence lower bound, without a weight to tune.
    """
    error = mean_over_processes(F.mse_loss(reconstruction, image))
    return 0.5 * torch.log(error + 1e-8)  # 1e-8: finite for a perfect fit


def dice_loss(probabilities: Tensor, mask: Tensor) -> Tensor:
    """1 - Dice over a batch of masks (B, K, H, W), with smoothing 1e-5, mean over K."""
    others = (0, *range(2, mask.dim()))
    overlap, total = (sum_over_processes(part.sum(dim=others)) for part in (probabilities * mask, probabilities + mask))
    return (1.0 - (2.0 * overlap + 1e-5) / (total + 1e-5)).mean()


def dice_score(probabilities: Tensor, mask: Tensor) -> Tensor:
    """Dice of a batch's predicted masks, mean over K: threshold 0.5 if K = 1, else the most probable class."""
    if probabilities.shape[1] == 1:
        decided = probabilities > 0.5
    else:
        decided = torch.zeros_like(probabilities).scatter_(1, probabilities.argmax(dim=1, keepdim=True), 1.0)
    return 1.0 - dice_loss(decided.float(), mask)


# bce: a sigmoid in float32 is exactly 1 for logits above 17, where the gradient vanishes
IMAGE_TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": F.l1_loss,
    "mse": F.mse_loss,
    "bce": F.binary_cross_entropy,
    "ssim": ssim_loss,
    "sigma": sigma_loss,
    "dice": dice_loss,
}


# validation scores by the model's target; higher is better, except for l1
SCORES: dict[str, dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "image": {"l1": F.l1_loss, "ssim": lambda result, image: 1.0 - ssim_loss(result, image)},
    "mask": {"dice": dice_score},
}


def kl_per_dim(latent: Latent) -> Tensor:
    """KL(q(z|x) ‖ N(0, I)) of each latent dimension, in nats: shape of the latent (Kingma & Welling 2014, B)."""
    assert latent.logvar is not None
    mean, logvar = latent.mean.float(), latent.logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)


def free_bits(kl: Tensor, nats: float) -> Tensor:
    """Batch-mean KL, a scalar, with `nats` per latent channel without cost (Kingma et al. 2016, eq. 15)."""
    per_channel = kl.mean(dim=0).flatten(1).sum(dim=1) if kl.dim() > 2 else kl.mean(dim=0)
    return mean_over_processes(per_channel).clamp(min=nats).sum() if nats > 0 else per_channel.sum()


def beta_at(beta: Beta, epoch: float) -> float:
    """β at `epoch` of its phase, counted from 0, with a fraction.

    Linear: start to end over `epochs`, then end. Cyclical (Fu et al. 2019): each cycle of `epochs`
    rises linearly in its first half and is constant in the second.
    """
    if beta.schedule == "constant":
        return beta.end
    cyclical = beta.schedule == "cyclical"
    progress = (2.0 * (epoch % beta.epochs) if cyclical else epoch) / beta.epochs
    return beta.start + (beta.end - beta.start) * min(progress, 1.0)


class PerceptualDistance(nn.Module):
    """Mean squared distance of VGG16 features after three layers (Johnson et al. 2016)."""

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Path) -> None:
        super().__init__()
        from torchvision.models import vgg16

        state = torch.load(weights, weights_only=True, map_location="cpu")
        with torch.device("meta"):  # without allocating the 130 million unused classifier weights
            layers = vgg16().features[: VGG16_LAYERS[-1] + 1]
        wanted = {name: state[f"features.{name}"] for name in layers.state_dict()}
        layers.load_state_dict(wanted, assign=True)
        for layer in layers:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # the features before it are used too
        self.layers = layers.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])

    def forward(self, reconstruction: Tensor, image: Tensor) -> Tensor:
        """Scalar distance of two batches (B, 1 or 3, H, W) in [0, 1]."""
        a, b = self._normalise(reconstruction), self._normalise(image)
        total = reconstruction.new_zeros(())
        for index, layer in enumerate(self.layers):
            a, b = layer(a), layer(b)
            if index in VGG16_LAYERS:
                total = total + F.mse_loss(a, b)
        return total

    def _normalise(self, image: Tensor) -> Tensor:
        return (image.expand(-1, 3, -1, -1) - self.mean) / self.std
