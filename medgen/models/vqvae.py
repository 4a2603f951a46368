"""VQ-VAE: a latent grid of codes from a learnt codebook (system B; van den Oord et al. 2017).

The encoder's vector at each place of the grid is replaced by the nearest of K codes. The step has no gradient, so the
decoder's is handed on to the encoder as it is (straight-through). Two more terms: the codebook loss pulls codes to the
vectors they stand for, the commitment loss keeps vectors near their codes; `loss.commitment` weighs the second.
"""

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from medgen.config import Model
from medgen.models.base import GenerativeModel, Latent, ModelOutput
from medgen.models.residual import residual_decoder, residual_encoder, spatial_latent

CODE_CHANNELS = 64  # of a code where model.latent_channels says nothing (van den Oord et al.)
EMA_DECAY = 0.99
DEAD_BELOW = 0.05  # a code with less than this share of an even use is dead
REVIVED_AT = 2 * DEAD_BELOW  # a new code that nobody takes, such as a second one on a black background, dies soon
MAX_COMPARED = 1 << 15  # vectors compared with all codes at once: 64 MB of distances for 512 codes


class VQVAE(GenerativeModel):
    """Images (B, C, S, S) <-> latents (B, Z, h, h) that are codes at every place; `Latent.codes` numbers them."""

    def __init__(self, params: Model, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        sized = params.model_copy(update={"latent_channels": params.latent_channels or CODE_CHANNELS})
        self.latent_shape = spatial_latent(sized, image_shape)
        self.encoder = residual_encoder(sized, image_shape, self.latent_shape[0])
        self.decoder = residual_decoder(sized, image_shape, self.latent_shape[0])
        self.quantizer = Quantizer(params.num_codes, self.latent_shape[0], params.codebook)

    @property
    def codes(self) -> Tensor:
        """The codebook (K, Z)."""
        return self.quantizer.place(self.quantizer.codebook).detach()

    def forward(self, image: Tensor, label: Tensor | None = None) -> ModelOutput:
        """One pass for the objective, with the terms `codebook` (where codes learn by gradient) and `commitment`."""
        vectors = self._vectors(image)
        if self.training:
            self.quantizer.revive(vectors.detach())
        codes, nearest = self.quantizer(vectors)
        if self.training:
            self.quantizer.follow(vectors.detach(), codes)
        value = vectors + (nearest - vectors).detach()
        latent = Latent(value=value, mean=nearest, codes=codes)
        return ModelOutput(self._decode(value), latent, self._terms(vectors, nearest))

    def predict(self, image: Tensor, label: Tensor | None = None) -> ModelOutput:
        """One pass with the terms of `forward`, without moving a code."""
        vectors = self._vectors(image)
        codes, nearest = self.quantizer(vectors)
        latent = Latent(value=nearest, mean=nearest, codes=codes)
        return ModelOutput(self._decode(nearest), latent, self._terms(vectors, nearest))

    def encode(self, image: Tensor, label: Tensor | None = None) -> Latent:
        """Images (B, C, S, S) -> the codes at each place, (B, Z, h, h), and their numbers (B, h, h)."""
        codes, nearest = self.quantizer(self._vectors(image))
        return Latent(value=nearest, mean=nearest, codes=codes)

    def decode(self, latent: Tensor, label: Tensor | None = None) -> Tensor:
        """Latents (B, Z, h, h), moved to their nearest codes -> images (B, C, S, S) in [0, 1]."""
        return self._decode(self.quantizer(latent.float())[1])

    def _terms(self, vectors: Tensor, nearest: Tensor) -> dict[str, Tensor]:
        terms = {"commitment": F.mse_loss(vectors, nearest.detach())}
        if self.quantizer.learns_by_gradient:
            terms["codebook"] = F.mse_loss(nearest, vectors.detach())
        return terms

    def _vectors(self, image: Tensor) -> Tensor:
        return self.quantizer.place(self.encoder(image).float())  # distances of near codes need float32

    def _decode(self, latent: Tensor) -> Tensor:
        return torch.sigmoid(self.decoder(latent).float())


class Quantizer(nn.Module):
    """A codebook of K vectors: nearest code by Euclidean distance, or by angle, in float32.

    At the first training step every code is put on a vector of the batch; later those that hardly anyone uses are.

    Args:
        num_codes: K.
        channels: Z, numbers of a code.
        kind: "gradient", the codebook loss moves codes; "ema", codes follow the mean of their vectors (van den Oord
            et al., appendix A.1); "cosine", as gradient with vectors and codes on the unit sphere (Yu et al. 2022).
    """

    codebook: Tensor
    usage: Tensor
    sums: Tensor

    def __init__(self, num_codes: int, channels: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.num_codes = num_codes
        initial = torch.randn(num_codes, channels) / channels**0.5
        if kind == "ema":
            self.register_buffer("codebook", initial)
        else:
            self.codebook = nn.Parameter(initial)
        # moving averages: how many vectors a code has in shares of an even use, and their sum in the same unit
        self.register_buffer("usage", torch.zeros(num_codes))
        self.register_buffer("sums", torch.zeros(num_codes, channels))

    @property
    def learns_by_gradient(self) -> bool:
        """Whether the codebook loss moves the codes."""
        return self.kind != "ema"

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (B, Z, h, h) -> numbers of the nearest codes (B, h, h), and those codes (B, Z, h, h)."""
        with torch.no_grad():
            codebook = self.place(self.codebook)
            parts = torch.split(_flatten(vectors), MAX_COMPARED)
            codes = torch.cat([torch.cdist(part, codebook).argmin(dim=1) for part in parts])
        codes = codes.view(len(vectors), *vectors.shape[2:])
        return codes, self.look_up(codes)

    def look_up(self, codes: Tensor) -> Tensor:
        """Numbers (B, h, h) -> codes (B, Z, h, h)."""
        return F.embedding(codes, self.place(self.codebook)).movedim(-1, 1)

    def place(self, vectors: Tensor) -> Tensor:
        """Vectors (B, Z, h, h) or codes (K, Z) where they are compared: for "cosine" on the unit sphere, where the
        nearest by distance is the nearest by angle.
        """
        return F.normalize(vectors, dim=1) if self.kind == "cosine" else vectors

    @torch.no_grad()
    def revive(self, vectors: Tensor) -> None:
        """Before a training step's look-up: puts dead codes on vectors (B, Z, h, h) drawn from its batch.

        The same on all processes: the draws are those of the first.
        """
        flat = _flatten(vectors)
        drawn = flat[torch.randint(len(flat), (self.num_codes,), device=flat.device)]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(drawn, 0)
        # a batch that is not finite is reported and skipped: the codes must outlive it
        dead = (self.usage < DEAD_BELOW) & torch.isfinite(drawn).all(dim=1)
        self.codebook.data.copy_(torch.where(dead[:, None], drawn, self.codebook))
        self.sums.copy_(torch.where(dead[:, None], REVIVED_AT * drawn, self.sums))
        self.usage.masked_fill_(dead, REVIVED_AT)

    @torch.no_grad()
    def follow(self, vectors: Tensor, codes: Tensor) -> None:
        """After a training step's look-up: counts who uses which code; with "ema" moves codes to their vectors' mean.

        The same on all processes: sums are over all of them.
        """
        flat, numbers = _flatten(vectors), codes.flatten()
        counts = torch.zeros_like(self.usage).index_add_(0, numbers, torch.ones_like(flat[:, 0]))
        sums = torch.zeros_like(self.sums).index_add_(0, numbers, flat)
        if torch.distributed.is_initialized():
            for tensor in (counts, sums):
                torch.distributed.all_reduce(tensor)
        even = counts.sum() / self.num_codes
        finite = torch.isfinite(sums).all()
        self.usage.copy_(torch.where(finite, self.usage.lerp(counts / even, 1 - EMA_DECAY), self.usage))
        self.sums.copy_(torch.where(finite, self.sums.lerp(sums / even, 1 - EMA_DECAY), self.sums))
        if self.kind == "ema":
            means = self.sums / self.usage.clamp(min=1e-5)[:, None]
            self.codebook.copy_(torch.where(finite, means, self.codebook))


def _flatten(vectors: Tensor) -> Tensor:
    """(B, Z, h, h) -> (B·h·h, Z) float32."""
    return vectors.movedim(1, -1).flatten(0, 2).float()
