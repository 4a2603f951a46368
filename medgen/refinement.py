"""The refiner: draws the detail that a decoder leaves out, as a conditional flow on pixels.

A decoder that is trained on pixel losses gives the mean of all images that fit a latent: blurred where they differ.
The refiner draws one of them: the residual x - d of a training image x and its decoded latent d, given d, by flow
matching (Lipman et al. 2023). Second-stage diffusion on a VAE's images is due to Pandey et al. (DiffuseVAE, 2022).

The decoder lacks texture, and the prior gets structure wrong. For the second, training adds noise of a random level to
latents before they are decoded and gives the level to the network (conditioning augmentation, Ho et al. 2022). The more
noise, the more of the image the flow draws itself. Sampling adds noise of a chosen level to a prior's latent.

The network gives only what differs from the velocity of a Gaussian residual of the train split's power spectrum (the
preconditioning of Karras et al. 2022, by frequency), and steps are taken in coordinates where that velocity is zero. An
untrained refiner therefore draws noise of the right spectrum, training starts from there, and few steps are enough.

Pixels are moved to channels in patches (space-to-depth), so that the network works on a grid of about 32 positions a
side at any image size.

Shapes: B batch, C H W image, D latent, P side of a patch.
"""

import hashlib
import json
from pathlib import Path
from typing import Self

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from medgen import config
from medgen.config import seed_of
from medgen.errors import UserError
from medgen.files import write_folder
from medgen.nn.solver import integrate
from medgen.nn.velocity import VelocityNetwork
from medgen.types import Decoder

LABEL_DROPOUT = 0.1  # of labels in training, so that their strength can be chosen when drawing (Ho & Salimans 2022)
GRID_SIDE = 32  # positions a side that the network works on, where the image size allows
SCALES = ("residual_scale", "spectrum", "latent_scale")  # arguments of `Refiner` that are fitted, not learnt
WEIGHTS, DESCRIPTION = "refiner.safetensors", "refiner.json"


class Refiner:
    """A velocity network on standardised residuals, given the decoded image, its latent's noise level and the class.

    Args:
        network: as `build_network` makes it.
        params: the parameters.
        image_shape: (C, H, W).
        num_classes: that the network is conditioned on; 0 for none.
        residual_scale: (C,) root-mean-square residual of each channel.
        spectrum: (C, H, W // 2 + 1) mean power of the standardised residual at each frequency of `rfft2`.
        latent_scale: (*latent_shape) standard deviation of each dimension of the train split's latents.
    """

    def __init__(
        self,
        network: nn.Module,
        params: config.Refiner,
        image_shape: tuple[int, int, int],
        num_classes: int,
        residual_scale: Tensor,
        spectrum: Tensor,
        latent_scale: Tensor,
    ) -> None:
        self.network, self.params = network, params
        self.image_shape, self.num_classes = image_shape, num_classes
        self.residual_scale, self.spectrum, self.latent_scale = residual_scale, spectrum, latent_scale
        self.patch = patch_size(image_shape)

    @classmethod
    def start(
        cls,
        params: config.Refiner,
        image_shape: tuple[int, int, int],
        num_classes: int,
        residual_scale: Tensor,
        spectrum: Tensor,
        latent_scale: Tensor,
    ) -> Self:
        """A refiner before its training; the same seed gives the same network."""
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(params.seed))
            network = build_network(params, image_shape, num_classes)
        return cls(network, params, image_shape, num_classes, residual_scale, spectrum, latent_scale)

    def loss(
        self,
        network: nn.Module,
        images: Tensor,
        decoded: Tensor,
        levels: Tensor,
        labels: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Mean squared error of the velocity, a scalar.

        Args:
            network: this refiner's own, as the loop wraps it.
            images: (B, C, H, W) in [0, 1].
            decoded: (B, C, H, W), their latents' images.
            levels: (B,) noise on those latents, in standard deviations.
            labels: (B,), -1 where unlabelled.
            generator: gives all that is random, on the CPU.
        """
        target = (images - decoded) / self._scale(images)
        noise = torch.randn(target.shape, generator=generator).to(target.device)
        # logit-normal times: those near 0 and 1 are easy (Esser et al. 2024, section 3.1)
        time = torch.randn(len(images), generator=generator).sigmoid().to(target.device)
        dropped = (torch.rand(len(images), generator=generator) < LABEL_DROPOUT).to(target.device)
        labels = labels.masked_fill(dropped, -1) if self.num_classes else torch.full_like(labels, -1)
        x = torch.lerp(noise, target, time[:, None, None, None])
        found = self._correction(network, x, time, labels, decoded, levels)
        return F.mse_loss(self._gaussian_velocity(x, time) + found, target - noise)

    def noise_latents(self, latents: Tensor, levels: Tensor, generator: torch.Generator) -> Tensor:
        """Latents (B, *latent_shape) with Gaussian noise of `levels` (B,) times each dimension's standard deviation."""
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        amount = levels.to(latents.device).view(-1, *[1] * (latents.dim() - 1))
        return latents + amount * self.latent_scale.to(latents.device) * noise

    @torch.no_grad()
    def draw(self, decoder: Decoder, latents: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        """Refined images (B, C, H, W) in [0, 1] of a prior's latents, on their device."""
        levels = torch.full((len(latents),), self.params.sampling_noise, device=latents.device)
        noised = self.noise_latents(latents, levels, generator)
        return self.refine(decoder.decode(noised, labels).float(), levels, labels, generator)

    @torch.no_grad()
    def refine(self, decoded: Tensor, levels: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        """Images (B, C, H, W) in [0, 1] that fit decoded ones, whose latents have noise of the levels (B,)."""
        self.network.eval()
        if labels is None or not self.num_classes:
            labels = torch.full((len(decoded),), -1, device=decoded.device)
        noise = torch.randn(decoded.shape, generator=generator).to(decoded.device)

        def slope(y: Tensor, time: Tensor) -> Tensor:
            """dy/dt where x_t = S_t^(1/2) y: the network's correction alone, as the Gaussian part is zero in y."""
            spread = self._spread(time)
            found = self._guided(_filter(y, spread.sqrt()), time, labels, decoded, levels)
            return _filter(found, spread.rsqrt())

        y = integrate(slope, noise, self.params.sampling_steps, self.params.solver)
        residual = _filter(y, self.spectrum.to(y.device).sqrt())
        return (decoded + self._scale(decoded) * residual).clamp(0.0, 1.0)

    def _guided(self, x: Tensor, time: Tensor, labels: Tensor, decoded: Tensor, levels: Tensor) -> Tensor:
        """The correction with the label's strength: unconditional + guidance · (conditional - unconditional)."""
        guidance = self.params.guidance
        conditional = self._correction(self.network, x, time, labels, decoded, levels)
        if guidance == 1.0 or bool((labels < 0).all()):
            return conditional
        unconditional = self._correction(self.network, x, time, torch.full_like(labels, -1), decoded, levels)
        return torch.lerp(unconditional, conditional, guidance)

    def _correction(
        self, network: nn.Module, x: Tensor, time: Tensor, labels: Tensor, decoded: Tensor, levels: Tensor
    ) -> Tensor:
        """The network's addition to the Gaussian velocity at `x` (B, C, H, W)."""
        deviation = ((1.0 - time).square() + time.square()).sqrt()[:, None, None, None]
        patches, given = (F.pixel_unshuffle(image, self.patch) for image in (x / deviation, 2.0 * decoded - 1.0))
        found = network(patches, time, labels, given, levels).float()
        return F.pixel_shuffle(found, self.patch) / deviation

    def _gaussian_velocity(self, x: Tensor, time: Tensor) -> Tensor:
        """Mean velocity of Gaussian residuals of the train split's spectrum that are at `x` (B, C, H, W)."""
        t = time[:, None, None, None]
        return _filter(x, (t * self.spectrum.to(x.device) - (1.0 - t)) / self._spread(time))

    def _spread(self, time: Tensor) -> Tensor:
        """Power (B, C, H, W // 2 + 1) of x_t at each frequency, at times (B,)."""
        t = time[:, None, None, None]
        return (1.0 - t).square() + t.square() * self.spectrum.to(time.device)

    def _scale(self, images: Tensor) -> Tensor:
        return self.residual_scale.to(images.device).view(1, -1, 1, 1)


def _filter(images: Tensor, gains: Tensor) -> Tensor:
    """Images (B, C, H, W) with each frequency of `rfft2` multiplied by its gain."""
    with torch.autocast(images.device.type, enabled=False):
        filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(images.float()) * gains, s=images.shape[-2:])
        return filtered


def build_network(params: config.Refiner, image_shape: tuple[int, int, int], num_classes: int) -> VelocityNetwork:
    """The network for images (C, H, W), untrained."""
    (channels, height, width), patch = image_shape, patch_size(image_shape)
    shape = (channels * patch**2, height // patch, width // patch)
    return VelocityNetwork(shape, num_classes, params.channels, params.blocks, params.dropout, shape[0], levels=True)


def patch_size(image_shape: tuple[int, int, int]) -> int:
    """Side of a patch: a power of two that divides both sides and leaves a grid of at least `GRID_SIDE`, or 1."""
    _, height, width = image_shape
    patch = 1
    while min(height, width) // (2 * patch) >= GRID_SIDE and height % (2 * patch) == 0 == width % (2 * patch):
        patch *= 2
    return patch


def save_refiner(folder: Path, refiner: Refiner, model: str) -> None:
    """Writes refiner.safetensors and refiner.json; `model` is the SHA-256 of the weights of its decoder."""
    network = {f"network.{name}": tensor.detach().cpu() for name, tensor in refiner.network.state_dict().items()}
    scales = {name: getattr(refiner, name).cpu() for name in SCALES}
    weights = safetensors.torch.save({name: tensor.contiguous() for name, tensor in {**network, **scales}.items()})
    plain = {
        "enabled": True,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "model": model,
        "image_shape": refiner.image_shape,
        "num_classes": refiner.num_classes,
        "refiner": refiner.params.model_dump(mode="json"),
    }
    write_folder(folder, {WEIGHTS: weights, DESCRIPTION: (json.dumps(plain, indent=2) + "\n").encode()})


def save_none(folder: Path, model: str) -> None:
    """Writes a refiner.json that says that images of the model with the SHA-256 `model` are not refined."""
    write_folder(folder, {DESCRIPTION: (json.dumps({"enabled": False, "model": model}, indent=2) + "\n").encode()})


def load_refiner(folder: Path, model: str, device: torch.device | str = "cpu") -> Refiner | None:
    """Reads what `save_refiner` or `save_none` wrote, for the model whose weights have the SHA-256 `model`.

    Raises:
        UserError: there is no refiner, it is damaged, or it was trained for another model.
    """
    path = folder / DESCRIPTION
    again = "run `medgen refiner` again"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        trained_for = meta["model"]
        if trained_for != model:
            raise UserError(f"{folder}: made for model {trained_for[:12]}, the model here is {model[:12]}; {again}")
        if not meta["enabled"]:
            return None
        weights = (folder / WEIGHTS).read_bytes()
        if meta["sha256"] != hashlib.sha256(weights).hexdigest():
            raise UserError(f"{folder / WEIGHTS}: not the file that {DESCRIPTION} describes; {again}")
        params = config.Refiner.model_validate(meta["refiner"])
        tensors = safetensors.torch.load(weights)
        with torch.device("meta"):  # no random weights that would be overwritten
            network = build_network(params, tuple(meta["image_shape"]), meta["num_classes"])
        network = network.to_empty(device="cpu")
        network.load_state_dict({name: tensors[f"network.{name}"] for name in network.state_dict()})
        scales = [tensors[name] for name in SCALES]
        return Refiner(network.to(device).eval(), params, tuple(meta["image_shape"]), meta["num_classes"], *scales)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no refiner here; run `medgen refiner` (or `dvc repro`) first") from None
    except (ValueError, SafetensorError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); {again}") from None
