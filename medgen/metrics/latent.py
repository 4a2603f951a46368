"""What the encoder makes of the data: how much it says, and in how many of its numbers."""

import torch
from torch import Tensor

ACTIVE_VARIANCE = 0.01  # Burda et al.'s threshold


def kl_nats(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(logvar)) from N(0, 1), summed over the latent: (B, ...) twice -> (B,) nats.

    Source: Kingma and Welling: Auto-encoding variational Bayes, 2014, appendix B.
    """
    mean, logvar = mean.double(), logvar.double()
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(dim=1)


def active_units(means: Tensor) -> int:
    """How many of D latent numbers vary with the image: posterior means (N, ...) of a split -> count in 0..D.

    A unit is active where the variance over images of its posterior mean exceeds 0.01.
    Source: Burda, Grosse, Salakhutdinov: Importance weighted autoencoders, 2016, section 5.1.
    """
    variance = means.double().flatten(1).var(dim=0, correction=0)
    return int((variance > ACTIVE_VARIANCE).sum())


def codebook_use(codes: Tensor, num_codes: int) -> dict[str, float]:
    """How a split uses a codebook of K: code numbers (N, h, w) -> `codebook_usage`, the share of codes that occur, and
    `codebook_perplexity`, the number of evenly used codes with as much entropy (1 to K).

    Source: van den Oord et al.: Neural discrete representation learning, 2017.
    """
    counts = torch.bincount(codes.flatten(), minlength=num_codes).double()
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * shares.log()).sum()
    return {"codebook_usage": len(shares) / num_codes, "codebook_perplexity": float(entropy.exp())}
