"""Metrics of the latent: KL divergence, active dimensions, and codebook usage."""

import torch
from torch import Tensor

ACTIVE_VARIANCE = 0.01  # Burda et al.'s threshold


def kl_nats(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(logvar)) from N(0, 1), summed over the latent: (B, ...) twice -> (B,) nats.

    Source: Kingma and Welling: Auto-encoding variational Bayes, 2014, appendix B.
    """
    mean, logvar = mean.double(), logvar.double()
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(dim=1)


def active_units(count: int, total: Tensor, squares: Tensor) -> int:
    """Number of latent dimensions that vary with the image, from the posterior means (N, ...) of a split.

    A dimension is active if the variance over images of its posterior mean exceeds 0.01. Arguments: the number of
    images, and the float64 sums (...) of the means and of their squares.
    Source: Burda, Grosse, Salakhutdinov: Importance weighted autoencoders, 2016, section 5.1.
    """
    variance = squares / count - (total / count).square()
    return int((variance > ACTIVE_VARIANCE).sum())


def codebook_use(codes: Tensor, num_embeddings: int) -> dict[str, float]:
    """`codebook_usage` of the code indices (N, h, w) of a split."""
    return codebook_usage(torch.bincount(codes.flatten(), minlength=num_embeddings))


def codebook_usage(counts: Tensor) -> dict[str, float]:
    """Usage and perplexity of a codebook, from the number of times (K,) that a split uses each code.

    Returns:
        codebook_usage: share of the codes that occur; codebook_perplexity: exp of the entropy of the code frequencies,
        from 1 to K.

    Source: van den Oord et al.: Neural discrete representation learning, 2017.
    """
    shares = counts[counts > 0].double() / counts.sum()
    entropy = -(shares * shares.log()).sum()
    return {"codebook_usage": len(shares) / len(counts), "codebook_perplexity": float(entropy.exp())}
