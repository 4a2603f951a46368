"""VQ-VAE: a latent grid of codes from a learnt codebook (van den Oord et al. 2017).

The encoder's vector at each position of the grid is replaced by the nearest of K codes. This step has no gradient, so
the decoder's gradient is passed to the encoder unchanged (straight-through). Two more loss terms: the codebook loss
pulls codes towards their vectors, the commitment loss keeps vectors near their codes; `loss.commitment_cost` weighs it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from medgen.config import Model
from medgen.models.base import GenerativeModel, Latent, ModelOutput
from medgen.models.residual import residual_decoder, residual_encoder, spatial_latent
from medgen.nn.conditions import Conditions
from medgen.nn.quantizer import Quantizer

DEFAULT_CHANNELS = 64  # Z if model.latent_channels is null (van den Oord et al.)


class VQVAE(GenerativeModel):
    """Images (B, C, H, W) <-> latents (B, Z, h, w) of codes; `Latent.codes` holds their indices."""

    encoder_parts = ("encoder", "quantizer")

    def __init__(self, params: Model, image_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        params = params.model_copy(update={"latent_channels": params.latent_channels or DEFAULT_CHANNELS})
        self.latent_shape = spatial_latent(params, image_shape)
        self.encoder = residual_encoder(params, image_shape, self.latent_shape[0])
        self.decoder = residual_decoder(params, image_shape, self.latent_shape[0])
        self.quantizer = Quantizer(params.num_embeddings, self.latent_shape[0], params.codebook)

    @property
    def codebook(self) -> Tensor:
        """The codes (K, Z), as latents hold them."""
        return self.quantizer.project(self.quantizer.codebook).detach()

    def forward(self, image: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> ModelOutput:
        """One pass for the objective, with the terms `commitment` and, if codes learn by gradient, `codebook`."""
        vectors = self._encode_vectors(image)
        if self.quantizer.training:  # a frozen encoder keeps its codes
            self.quantizer.restart_dead_codes(vectors.detach())
        codes, nearest = self.quantizer(vectors)
        if self.quantizer.training:
            self.quantizer.update_ema(vectors.detach(), codes)
        value = vectors + (nearest - vectors).detach()
        latent = Latent(value=value, mean=nearest, codes=codes)
        return ModelOutput(self._decode_vectors(value), latent, self._terms(vectors, nearest))

    def predict(self, image: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> ModelOutput:
        """One pass with the terms of `forward`, which leaves the codebook as it is."""
        vectors = self._encode_vectors(image)
        codes, nearest = self.quantizer(vectors)
        latent = Latent(value=nearest, mean=nearest, codes=codes)
        return ModelOutput(self._decode_vectors(nearest), latent, self._terms(vectors, nearest))

    def encode(self, image: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> Latent:
        """Images (B, C, H, W) -> codes (B, Z, h, w) and their indices (B, h, w)."""
        codes, nearest = self.quantizer(self._encode_vectors(image))
        return Latent(value=nearest, mean=nearest, codes=codes)

    def decode(self, latent: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> Tensor:
        """Latents (B, Z, h, w), replaced by their nearest codes -> images (B, C, H, W) in [0, 1]."""
        return self._decode_vectors(self.quantizer(latent.float())[1])

    def _terms(self, vectors: Tensor, nearest: Tensor) -> dict[str, Tensor]:
        terms = {"commitment": F.mse_loss(vectors, nearest.detach())}
        if self.quantizer.learns_by_gradient:
            terms["codebook"] = F.mse_loss(nearest, vectors.detach())
        return terms

    def _encode_vectors(self, image: Tensor) -> Tensor:
        return self.quantizer.project(self.encoder(image).float())  # distances of near codes need float32

    def _decode_vectors(self, latent: Tensor) -> Tensor:
        return torch.sigmoid(self.decoder(latent).float())
