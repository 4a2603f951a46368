"""The same image with another label.

- A model whose encoder and decoder use the label (`cvae`): the latent encoded with the image's own label holds what the
  label does not, and is decoded with the other one (Sohn et al. 2015).
- A `flow` prior that is conditional: the flow of the own label is followed back to noise, and that of the other label
  forward from there (the inversion of DDIM, Song et al. 2021; dual diffusion implicit bridges, Su et al. 2023).
"""

import torch
from torch import Tensor

from medgen.errors import UserError
from medgen.models import GenerativeModel
from medgen.priors import Prior
from medgen.priors.flow import Flow


@torch.no_grad()
def change_label(model: GenerativeModel, prior: Prior, images: Tensor, labels: Tensor, others: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1] of labels (B,), decoded as those of labels `others` (B,); all on one device.

    Raises:
        UserError: neither the model nor the prior can change the label of an image.
    """
    check_counterfactual(model, prior)
    latents = model.encode(images, labels).mean
    if not model.conditional:
        assert isinstance(prior, Flow)
        latents = prior.transport(prior.invert(latents, labels), others)
    return model.decode(latents, others).float()


def check_counterfactual(model: GenerativeModel, prior: Prior) -> None:
    """Raise UserError if neither the model nor the prior can change the label of an image."""
    if not model.conditional and not (isinstance(prior, Flow) and prior.conditional):
        raise UserError(
            f"counterfactual: the model does not use labels, and prior {prior.name!r} cannot change the label of a "
            "latent; expected model.name: cvae, or a flow of a dataset with labels "
            "(`medgen prior --set prior.name=flow --set prior.conditional=true`)"
        )
