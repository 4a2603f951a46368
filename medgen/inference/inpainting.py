"""Fill a hole in an image with what the model finds most probable there.

The latent minimises the squared error of the decoded image at the known pixels, divided by twice the decoder's error
variance, minus the log density of the prior: the maximum of the posterior of the latent given the known pixels
(Yeh et al., Semantic image inpainting with deep generative models, 2017; Bora et al., Compressed sensing using
generative models, 2017). With a `flow` prior the noise that it starts from is optimised (Ben-Hamu et al., D-Flow,
2024).

Shapes: C channels, H W height and width, D dimensions of a latent, R principal axes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from medgen.errors import UserError
from medgen.models import GenerativeModel
from medgen.priors import AnalyticPrior, Prior
from medgen.priors.axes import PrincipalAxes
from medgen.priors.flow import Flow

NUM_ITERATIONS = 100  # of L-BFGS, at most
FLOW_STEPS = 4  # of the midpoint rule, through which the gradient passes
MIN_VARIANCE = 1e-4  # of the decoder's error: a hundredth of the grey values


def inpaint(model: GenerativeModel, prior: Prior, image: Tensor, hole: Tensor, label: Tensor | None) -> Tensor:
    """The image (1, C, H, W) in [0, 1] with the pixels of `hole` (1, 1, H, W), bool, replaced; others keep their bits.

    `label` (1,) is the image's class, for a model or prior that uses labels. All tensors are on the model's device.

    Raises:
        UserError: the model has a codebook, or the hole is empty or the whole image.
    """
    check_inpainting(model)
    known = (~hole).expand_as(image)
    if not bool(known.any()) or not bool(hole.any()):
        raise UserError("mask: covers " + ("no pixel" if bool(known.any()) else "all pixels") + "; expected a part")
    of_prior = label if prior.conditional and label is not None else torch.full((1,), -1, device=image.device)
    latent_of, coordinates_of, energy = _coordinates(prior, of_prior)
    with torch.no_grad():
        filled = torch.where(known, image, image[known].mean())
        latent = model.encode(filled, label).mean
        error = (model.decode(latent, label) - image)[known].square().mean()
        coordinates = coordinates_of(latent)
    precision = 1.0 / error.clamp_min(MIN_VARIANCE)
    found = coordinates.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([found], max_iter=NUM_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        decoded = model.decode(latent_of(found), label)
        total: Tensor = 0.5 * precision * (decoded - image)[known].square().sum() + energy(found)
        (found.grad,) = torch.autograd.grad(total, found)
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return torch.where(known, image, model.decode(latent_of(found), label).float())


def check_inpainting(model: GenerativeModel) -> None:
    """Raise UserError if the decoder has no gradient."""
    if model.codebook is not None:
        raise UserError(
            "inpaint: this model rounds latents to the codes of its codebook, which leaves no gradient; expected "
            "model.name autoencoder, autoencoder_kl, vae, cvae or spatial_vae"
        )


Map = Callable[[Tensor], Tensor]


def _coordinates(prior: Prior, label: Tensor) -> tuple[Map, Map, Map]:
    """Functions of coordinates in which the prior is about N(0, I): to latents, from latents, and minus log density.

    L-BFGS needs few iterations where all coordinates have one scale.
    """
    shape = prior.latent_shape
    if isinstance(prior, Flow):
        flow: Flow = prior
        return (
            lambda noise: flow.transport(noise, label, FLOW_STEPS),
            lambda latent: flow.invert(latent, label),
            lambda noise: 0.5 * noise.square().sum(),
        )
    analytic: AnalyticPrior = prior  # type: ignore[assignment]
    axes = getattr(prior, "axes", None)

    def energy(latent: Tensor) -> Tensor:
        return -analytic.log_likelihood(latent.cpu(), label.cpu()).sum().to(latent.device)

    if not isinstance(axes, PrincipalAxes) or len(axes.scales) == 0:
        return lambda latent: latent, lambda latent: latent, energy

    def latent_of(white: Tensor) -> Tensor:
        return axes.colour(white.cpu()).view(-1, *shape).to(white.device)

    def coordinates_of(latent: Tensor) -> Tensor:
        return axes.whiten(latent.flatten(1).cpu()).to(latent.device)

    return latent_of, coordinates_of, lambda white: energy(latent_of(white))
