"""Codebook of vectors (K, Z) that a VQ-VAE's latents are made of (van den Oord et al. 2017).

Shapes: B batch, Z channels of a vector, h w grid (of a volume d h w), K codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medgen.nn.parallel import draw_vectors, sum_over_processes

EMA_DECAY = 0.99
DEAD_USAGE = 0.05  # a code with less than this share of an even use is dead
RESTART_USAGE = 2 * DEAD_USAGE  # a restarted code that stays unused, such as a second black one, is soon dead again
MAX_DISTANCES = 1 << 24  # distances held at once: 64 MB


class Quantizer(nn.Module):
    """Replaces vectors by the nearest of K codes, by Euclidean distance or by angle, in float32.

    The first training step moves every code to a vector of the batch; later steps move only dead codes.

    Args:
        num_embeddings: K.
        channels: Z.
        kind: "gradient": the codebook loss moves the codes; "ema": codes are the moving average of their vectors
            (van den Oord et al., appendix A.1); "cosine": as "gradient", on the unit sphere (Yu et al. 2022).
    """

    codebook: Tensor
    usage: Tensor
    sums: Tensor

    def __init__(self, num_embeddings: int, channels: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.num_embeddings = num_embeddings
        initial = torch.randn(num_embeddings, channels) / channels**0.5
        if kind == "ema":
            self.register_buffer("codebook", initial)
        else:
            self.codebook = nn.Parameter(initial)
        # moving averages for each code: the number of its vectors, in shares of an even use, and their sum in that unit
        self.register_buffer("usage", torch.zeros(num_embeddings))
        self.register_buffer("sums", torch.zeros(num_embeddings, channels))

    @property
    def learns_by_gradient(self) -> bool:
        """True if the codebook loss moves the codes."""
        return self.kind != "ema"

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (B, Z, h, w) -> indices of the nearest codes (B, h, w), and those codes (B, Z, h, w)."""
        with torch.no_grad():
            codes = nearest_codes(vectors, self.project(self.codebook))
        return codes, self.embed(codes)

    def embed(self, codes: Tensor) -> Tensor:
        """Indices (B, h, w) -> codes (B, Z, h, w)."""
        return F.embedding(codes, self.project(self.codebook)).movedim(-1, 1)

    def project(self, vectors: Tensor) -> Tensor:
        """Vectors (B, Z, h, w) or codes (K, Z), for "cosine" on the unit sphere.

        There the nearest code by distance is also the nearest by angle.
        """
        return F.normalize(vectors, dim=1) if self.kind == "cosine" else vectors

    @torch.no_grad()
    def restart_dead_codes(self, vectors: Tensor) -> None:
        """Move dead codes to vectors (B, Z, h, w) drawn from a training batch, before the batch is quantized."""
        drawn = draw_vectors(vectors.movedim(1, -1).flatten(1, -2).float(), self.num_embeddings)
        # the training loop reports and skips a batch that is not finite; the codes must stay finite
        dead = (self.usage < DEAD_USAGE) & torch.isfinite(drawn).all(dim=1)
        self.codebook.data.copy_(torch.where(dead[:, None], drawn, self.codebook))
        self.sums.copy_(torch.where(dead[:, None], RESTART_USAGE * drawn, self.sums))
        self.usage.masked_fill_(dead, RESTART_USAGE)

    @torch.no_grad()
    def update_ema(self, vectors: Tensor, codes: Tensor) -> None:
        """Update the moving averages after a training batch was quantized; for "ema" also move the codes.

        Sums are over all processes. A batch that is not finite changes nothing.
        """
        flat, indices = _flatten(vectors), codes.flatten()
        counts = torch.zeros_like(self.usage).index_add_(0, indices, torch.ones_like(flat[:, 0]))
        sums = torch.zeros_like(self.sums).index_add_(0, indices, flat)
        counts, sums = sum_over_processes(counts), sum_over_processes(sums)
        even = counts.sum() / self.num_embeddings
        finite = torch.isfinite(sums).all()
        self.usage.copy_(torch.where(finite, self.usage.lerp(counts / even, 1 - EMA_DECAY), self.usage))
        self.sums.copy_(torch.where(finite, self.sums.lerp(sums / even, 1 - EMA_DECAY), self.sums))
        if self.kind == "ema":
            means = self.sums / self.usage.clamp(min=1e-5)[:, None]
            self.codebook.copy_(torch.where(finite, means, self.codebook))


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Vectors (B, Z, h, w), codebook (K, Z) -> indices (B, h, w) of the nearest codes, in bounded memory."""
    flat = _flatten(vectors)
    # an export is for any number of vectors, so it cannot count parts
    parts = (flat,) if torch.compiler.is_exporting() else torch.split(flat, max(1, MAX_DISTANCES // len(codebook)))
    nearest = torch.cat([torch.cdist(part, codebook).argmin(dim=1) for part in parts])
    return nearest.view(-1, *vectors.shape[2:])


def _flatten(vectors: Tensor) -> Tensor:
    """(B, Z, h, w) -> (B·h·w, Z) float32."""
    return vectors.movedim(1, -1).flatten(0, -2).float()
