"""The refiner: draws the detail that a decoder leaves out, as a conditional flow on pixels.

A decoder that is trained on pixel losses gives the mean of all images that fit a latent: blurred where they differ.
The refiner draws one of them: the residual x - d of a training image x and its decoded latent d, given d, by flow
matching (Lipman et al. 2023). A second stage of diffusion on a VAE's images is due to Pandey et al. (DiffuseVAE, 2022).

The decoder lacks texture, and the prior gets structure wrong. For the second, training adds noise of a random level to
latents before they are decoded and gives the level to the network (conditioning augmentation, Ho et al. 2022). The more
noise, the more of the image the flow draws itself. Sampling adds noise of a chosen level to a prior's latent.

The residual is whitened: each frequency is divided by its deviation over the train split. The flow leads from white
noise n to the whitened residual r along an arc, y = cos θ · n + sin θ · r, of which the network gives dy/dθ =
cos θ · r - sin θ · n (TrigFlow of Lu & Song 2025; v-prediction of Salimans & Ho 2022). All that it takes and gives has
variance 1 at each time and frequency, so none is neglected. Untrained, the velocity is 0 and the residual is noise of
the right spectrum. Each frequency has an angle θ of its own: those of more power go ahead, coarse detail first.
Steps are taken in θ, so few are enough.

Prior and flow both draw a little less contrast than real images have. A gain for each radial frequency, fitted to the
train split once the flow is trained, makes up for it.

Pixels are moved to channels in patches of at most 4 (space-to-depth), so that the network works on a grid of 32
positions a side up to 128 px, and of a quarter of the image's side above.

Shapes: B batch, C H W image, D latent, P side of a patch.
"""

import hashlib
import json
import math
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
from medgen.io import write_folder
from medgen.models.base import Decoder
from medgen.nn.velocity import VelocityNetwork

LABEL_DROPOUT = 0.1  # of labels in training, so that their strength can be chosen when drawing (Ho & Salimans 2022)
GRID_SIDE = 32  # positions a side that the network works on, where the image size allows
MAX_PATCH = 4  # a larger patch asks one position of the network for too many pixels; large images have a larger grid
LEAD = 0.5  # how far frequencies of more power go ahead of others: 0 not at all, 1 as with white noise on pixels
EMPHASIS = 0.25  # of those frequencies in the loss: they are few, and structure is made of them; 0: none
SCALES = ("residual_scale", "spectrum", "latent_scale", "gain")  # arguments of `Refiner` that are fitted, not learnt
SCHEMA = 3  # of what is written; 1 had a flow on pixels, whose network gives another velocity, 2 had no gain
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
        gain: (H, W // 2 + 1) of refined images at each frequency of `rfft2`; none where left out.
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
        gain: Tensor | None = None,
    ) -> None:
        self.network, self.params = network, params
        self.image_shape, self.num_classes = image_shape, num_classes
        self.residual_scale, self.spectrum, self.latent_scale = residual_scale, spectrum, latent_scale
        self.gain = torch.ones(spectrum.shape[1:]) if gain is None else gain
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
        """Mean squared error of the velocity, weighted by frequency; a scalar.

        Args:
            network: this refiner's own, as the loop wraps it.
            images: (B, C, H, W) in [0, 1].
            decoded: (B, C, H, W), their latents' images.
            levels: (B,) noise on those latents, in standard deviations.
            labels: (B,), -1 where unlabelled.
            generator: gives all that is random, on the CPU.
        """
        residual = _filter((images - decoded) / self._scale(images), self.spectrum.rsqrt())
        noise = torch.randn(residual.shape, generator=generator).to(residual.device)
        # logit-normal times: those near 0 and 1 are easy (Esser et al. 2024, section 3.1)
        time = torch.randn(len(images), generator=generator).sigmoid().to(residual.device)
        dropped = (torch.rand(len(images), generator=generator) < LABEL_DROPOUT).to(residual.device)
        labels = labels.masked_fill(dropped, -1) if self.num_classes else torch.full_like(labels, -1)
        angle = self._angle(time)
        found = self._velocity(network, _turn(noise, residual, angle), time, labels, decoded, levels)
        weight = self._relative_deviation() ** EMPHASIS
        error = _filter(found - _turn(residual, -noise, angle), weight / weight.square().mean().sqrt())
        return error.square().mean()

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
        y = torch.randn(decoded.shape, generator=generator).to(decoded.device)
        num_steps = self.params.sampling_steps
        for step in range(num_steps):
            start, middle, end = (y.new_full((len(y),), (step + part) / num_steps) for part in (0.0, 0.5, 1.0))
            velocity = self._guided(y, start, labels, decoded, levels)
            if self.params.solver == "midpoint":
                ahead = y + _filter(velocity, self._angle(middle) - self._angle(start))
                velocity = self._guided(ahead, middle, labels, decoded, levels)
            y = y + _filter(velocity, self._angle(end) - self._angle(start))
        residual = _filter(y, self.spectrum.sqrt())
        return _filter(decoded + self._scale(decoded) * residual, self.gain).clamp(0.0, 1.0)

    def _guided(self, y: Tensor, time: Tensor, labels: Tensor, decoded: Tensor, levels: Tensor) -> Tensor:
        """The velocity with the label's strength: unconditional + guidance · (conditional - unconditional)."""
        guidance = self.params.guidance
        conditional = self._velocity(self.network, y, time, labels, decoded, levels)
        if guidance == 1.0 or bool((labels < 0).all()):
            return conditional
        unconditional = self._velocity(self.network, y, time, torch.full_like(labels, -1), decoded, levels)
        return torch.lerp(unconditional, conditional, guidance)

    def _velocity(
        self, network: nn.Module, y: Tensor, time: Tensor, labels: Tensor, decoded: Tensor, levels: Tensor
    ) -> Tensor:
        """dy/dθ at `y` (B, C, H, W) and times (B,)."""
        patches, given = (F.pixel_unshuffle(image, self.patch) for image in (y, 2.0 * decoded - 1.0))
        return F.pixel_shuffle(network(patches, time, labels, given, levels).float(), self.patch)

    def _angle(self, time: Tensor) -> Tensor:
        """θ (B, C, H, W // 2 + 1) of each frequency at times (B,) in [0, 1]: from 0 to π/2."""
        turn = (0.5 * math.pi * time)[:, None, None, None]
        return torch.atan2(turn.sin() * self._relative_deviation().to(time.device) ** LEAD, turn.cos())

    def _relative_deviation(self) -> Tensor:
        """Deviation of the residual at each frequency over the geometric mean of all."""
        deviation = self.spectrum.sqrt()
        return deviation / deviation.log().mean().exp()

    def _scale(self, images: Tensor) -> Tensor:
        return self.residual_scale.to(images.device).view(1, -1, 1, 1)


def _filter(images: Tensor, gains: Tensor) -> Tensor:
    """Images (B, C, H, W) with each frequency of `rfft2` multiplied by its gain."""
    with torch.autocast(images.device.type, enabled=False):
        filtered: Tensor = torch.fft.irfft2(
            torch.fft.rfft2(images.float()) * gains.to(images.device), s=images.shape[-2:]
        )
        return filtered


def _turn(images: Tensor, others: Tensor, angle: Tensor) -> Tensor:
    """cos θ · images + sin θ · others, each (B, C, H, W), with an angle for each frequency of `rfft2`."""
    return _filter(images, angle.cos()) + _filter(others, angle.sin())


def build_network(params: config.Refiner, image_shape: tuple[int, int, int], num_classes: int) -> VelocityNetwork:
    """The network for images (C, H, W), untrained."""
    (channels, height, width), patch = image_shape, patch_size(image_shape)
    shape = (channels * patch**2, height // patch, width // patch)
    return VelocityNetwork(
        shape,
        num_classes,
        params.channels,
        params.blocks,
        params.dropout,
        given_channels=shape[0],
        levels=True,
        smallest_side=min(8, min(shape[1:]) // 4),
        attention_side=16,  # ribs, spine and outlines go together over the whole image
    )


def patch_size(image_shape: tuple[int, int, int]) -> int:
    """Side of a patch: 1, 2 or 4, of which it divides both sides and leaves a grid of at least `GRID_SIDE`."""
    _, height, width = image_shape
    patch = 1
    while (
        patch < MAX_PATCH
        and min(height, width) // (2 * patch) >= GRID_SIDE
        and height % (2 * patch) == 0 == width % (2 * patch)
    ):
        patch *= 2
    return patch


def save_refiner(folder: Path, refiner: Refiner, model: str) -> None:
    """Writes refiner.safetensors and refiner.json; `model` is the SHA-256 of the weights of its decoder."""
    network = {f"network.{name}": tensor.detach().cpu() for name, tensor in refiner.network.state_dict().items()}
    scales = {name: getattr(refiner, name).cpu() for name in SCALES}
    weights = safetensors.torch.save({name: tensor.contiguous() for name, tensor in {**network, **scales}.items()})
    plain = {
        "enabled": True,
        "schema": SCHEMA,
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
        if (schema := meta.get("schema", 1)) != SCHEMA:
            raise UserError(f"{path}: found schema {schema}, expected {SCHEMA}: of another medgen; {again}")
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
