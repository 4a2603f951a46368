"""The refiner: a conditional flow on pixels or voxels that draws the detail which a decoder leaves out.

A decoder trained with pixel losses gives the mean of all images that fit a latent, which is blurred where they differ.
The refiner samples one of them: the residual x - d of an image x and its decoded latent d, given d, by flow matching
(Lipman et al. 2023). A second stage of diffusion on a VAE's images is due to Pandey et al. (DiffuseVAE, 2022).

The decoder lacks texture, and the prior makes errors of structure. To correct those too, training adds noise of a
random level to latents before they are decoded and conditions the network on the level (conditioning augmentation, Ho
et al. 2022): the more noise, the more of the image the flow draws itself. Sampling adds noise of a fixed level to a
prior's latent.

The residual is whitened: each frequency is divided by its deviation over the train split. The flow leads from white
noise n to the whitened residual r along an arc, y = cos θ · n + sin θ · r, and the network predicts dy/dθ =
cos θ · r - sin θ · n (TrigFlow of Lu & Song 2025; v-prediction of Salimans & Ho 2022). Its inputs and outputs have
variance 1 at each time and frequency, so no frequency is neglected. Untrained, the velocity is 0 and the residual is
noise of the right spectrum. Each frequency has its own angle θ: frequencies of more power are ahead, so that coarse
detail is drawn first. The sampler's steps are in θ, so few are enough.

Prior and flow both have slightly less contrast than real images. A gain for each radial frequency, fitted to the train
split after the flow is trained, corrects this.

Pixels are moved to channels in patches of at most 4×4 (space-to-depth): the network works on a grid of 32 positions a
side up to 128 px, and of a quarter of the image's side above. Patches of volumes have 2×2×2 voxels.

Shapes: B batch, C H W image (of a volume C D H W), H W // 2 + 1 frequencies of `rfftn` (of a volume D H W // 2 + 1).
"""

import math
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from medgen import config
from medgen.config import seed_of
from medgen.data.conditions import ConditionSpace
from medgen.errors import UserError
from medgen.io import parsing, read_description, read_tensors, save_artifact, to_json, write_folder
from medgen.models.base import Decoder
from medgen.nn.blocks import from_channels, to_channels
from medgen.nn.conditions import Conditions, drop_conditions
from medgen.nn.parallel import randn
from medgen.nn.velocity import VelocityNetwork
from medgen.priors.neural import load_network

# by the number of sides of an image or volume
GRID_SIDE = {2: 32, 3: 8}  # least side of the network's grid, where the image size allows
PATCH_SIDES = {2: (4, 2), 3: (2,)}  # in larger patches, one position would have to predict too many pixels
ATTENTION_SIDE = {2: 16, 3: 8}  # largest grid with self-attention: anatomical structures are related across the image
LEAD = 0.5  # exponent of the power by which a frequency is ahead: 0 all alike, 1 as with white noise on pixels
EMPHASIS = 0.25  # exponent of the power in the loss: frequencies of much power are few and carry the structure; 0: none
STATISTICS = ("residual_scale", "spectrum", "latent_scale", "gain")  # arguments of `Refiner` computed from images
SCHEMA = 3  # of the files; 1 had a flow on pixels with another velocity, 2 had no gain
WEIGHTS, DESCRIPTION = "refiner.safetensors", "refiner.json"


class Refiner:
    """A velocity network on whitened residuals, given the decoded image, its latent's noise level and the class.

    Args:
        network: made by `build_network`.
        params: the parameters.
        image_shape: (C, H, W) or (C, D, H, W).
        num_classes: that the network is conditioned on; 0 for none.
        residual_scale: (C,) root-mean-square residual of each channel.
        spectrum: (C, H, W // 2 + 1) mean power of the standardised residual at each frequency of `rfftn`.
        latent_scale: (*latent_shape) standard deviation of each dimension of the train split's latents.
        gain: (H, W // 2 + 1) of refined images at each frequency of `rfftn`; 1 by default.
        space: conditions besides the class that the network takes; None for none.
    """

    def __init__(
        self,
        network: nn.Module,
        params: config.Refiner,
        image_shape: tuple[int, ...],
        num_classes: int,
        residual_scale: Tensor,
        spectrum: Tensor,
        latent_scale: Tensor,
        gain: Tensor | None = None,
        space: ConditionSpace | None = None,
    ) -> None:
        self.network, self.params = network, params
        self.image_shape, self.num_classes = image_shape, num_classes
        self.residual_scale, self.spectrum, self.latent_scale = residual_scale, spectrum, latent_scale
        self.gain = torch.ones(spectrum.shape[1:]) if gain is None else gain
        self.patch = patch_size(image_shape)
        self.space = space

    @classmethod
    def create(
        cls,
        params: config.Refiner,
        image_shape: tuple[int, ...],
        num_classes: int,
        residual_scale: Tensor,
        spectrum: Tensor,
        latent_scale: Tensor,
        space: ConditionSpace | None = None,
    ) -> Self:
        """Return an untrained refiner; the same seed gives the same network."""
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(params.seed))
            network = build_network(params, image_shape, num_classes, space)
        sizes = (network, params, image_shape, num_classes)
        return cls(*sizes, residual_scale, spectrum, latent_scale, space=space)

    def loss(
        self,
        network: nn.Module,
        images: Tensor,
        decoded: Tensor,
        levels: Tensor,
        labels: Tensor,
        generator: torch.Generator,
        conditions: Conditions | None = None,
    ) -> Tensor:
        """Mean squared error of the velocity, weighted by frequency; a scalar.

        Args:
            network: this refiner's network, as the training loop wraps it.
            images: (B, C, H, W) in [0, 1].
            decoded: (B, C, H, W), decoded from the images' latents.
            levels: (B,) noise on those latents, in standard deviations.
            labels: (B,), -1 where unlabelled.
            generator: source of all randomness, on the CPU.
            conditions: of the images, on their device; None without any.
        """
        residual = _filter((images - decoded) / self._scale(images), self.spectrum.rsqrt())
        noise = randn(*residual.shape, generator=generator).to(residual.device)
        # logit-normal times: those near 0 and 1 are easy (Esser et al. 2024, section 3.1)
        time = randn(len(images), generator=generator).sigmoid().to(residual.device)
        labels, conditions = drop_conditions(labels, conditions, self.num_classes > 0, self.space, generator)
        angle = self._angle(time)
        y, target = _rotate(noise, residual, angle), _rotate(residual, -noise, angle)
        velocity = self._velocity(network, y, time, labels, decoded, levels, conditions)
        weight = self._relative_deviation() ** EMPHASIS
        error = _filter(velocity - target, weight / weight.square().mean().sqrt())
        return error.square().mean()

    def noise_latents(self, latents: Tensor, levels: Tensor, generator: torch.Generator) -> Tensor:
        """Latents (B, *latent_shape) with Gaussian noise of `levels` (B,) times each dimension's standard deviation."""
        noise = randn(*latents.shape, generator=generator).to(latents.device)
        amount = levels.to(latents.device).view(-1, *[1] * (latents.dim() - 1))
        return latents + amount * self.latent_scale.to(latents.device) * noise

    @torch.no_grad()
    def sample(
        self,
        decoder: Decoder,
        latents: Tensor,
        labels: Tensor | None,
        generator: torch.Generator,
        conditions: Conditions | None = None,
    ) -> Tensor:
        """Decode a prior's latents with noise on them, and refine: images (B, C, H, W) in [0, 1], on their device."""
        levels = torch.full((len(latents),), self.params.sampling_noise, device=latents.device)
        noised = self.noise_latents(latents, levels, generator)
        decoded = decoder.decode(noised, labels, conditions).float()
        return self.refine(decoded, levels, labels, generator, conditions)

    @torch.no_grad()
    def refine(
        self,
        decoded: Tensor,
        levels: Tensor,
        labels: Tensor | None,
        generator: torch.Generator,
        conditions: Conditions | None = None,
    ) -> Tensor:
        """Images (B, C, H, W) in [0, 1] sampled given decoded ones, whose latents have noise of the levels (B,).

        `conditions` are of the images, on any device; None if they are unknown.
        """
        if self.space is None:
            conditions = None
        elif conditions is None:
            conditions = Conditions.unknown(self.space, len(decoded))
        conditions = None if conditions is None else conditions.to(decoded.device)
        self.network.eval()
        if labels is None or not self.num_classes:
            labels = torch.full((len(decoded),), -1, device=decoded.device)
        y = torch.randn(decoded.shape, generator=generator).to(decoded.device)
        num_steps = self.params.sampling_steps
        for step in range(num_steps):
            start, middle, end = (y.new_full((len(y),), (step + part) / num_steps) for part in (0.0, 0.5, 1.0))
            velocity = self._guided_velocity(y, start, labels, decoded, levels, conditions)
            if self.params.solver == "midpoint":
                half = y + _filter(velocity, self._angle(middle) - self._angle(start))
                velocity = self._guided_velocity(half, middle, labels, decoded, levels, conditions)
            y = y + _filter(velocity, self._angle(end) - self._angle(start))
        residual = _filter(y, self.spectrum.sqrt())
        return _filter(decoded + self._scale(decoded) * residual, self.gain).clamp(0.0, 1.0)

    def _guided_velocity(
        self,
        y: Tensor,
        time: Tensor,
        labels: Tensor,
        decoded: Tensor,
        levels: Tensor,
        conditions: Conditions | None,
    ) -> Tensor:
        """Velocity with guidance: unconditional + guidance · (conditional - unconditional)."""
        guidance = self.params.guidance
        conditional = self._velocity(self.network, y, time, labels, decoded, levels, conditions)
        if guidance == 1.0 or (conditions is None and bool((labels < 0).all())):
            return conditional
        none, nothing = torch.full_like(labels, -1), None if conditions is None else conditions.cleared()
        unconditional = self._velocity(self.network, y, time, none, decoded, levels, nothing)
        return torch.lerp(unconditional, conditional, guidance)

    def _velocity(
        self,
        network: nn.Module,
        y: Tensor,
        time: Tensor,
        labels: Tensor,
        decoded: Tensor,
        levels: Tensor,
        conditions: Conditions | None,
    ) -> Tensor:
        """dy/dθ at `y` (B, C, H, W) and times (B,)."""
        patches, context = (to_channels(image, self.patch) for image in (y, 2.0 * decoded - 1.0))
        if conditions is None:
            return from_channels(network(patches, time, labels, context, levels).float(), self.patch)
        if (maps := conditions.on_image(decoded.shape[2:])) is not None:
            context = torch.cat([context, to_channels(maps, self.patch)], dim=1)
        velocity = network(patches, time, labels, context, levels, conditions.values)
        return from_channels(velocity.float(), self.patch)

    def _angle(self, time: Tensor) -> Tensor:
        """θ (B, C, H, W // 2 + 1) of each frequency at times (B,) in [0, 1]: from 0 to π/2."""
        angle = (0.5 * math.pi * time).view(-1, *[1] * self.spectrum.dim())
        return torch.atan2(angle.sin() * self._relative_deviation().to(time.device) ** LEAD, angle.cos())

    def _relative_deviation(self) -> Tensor:
        """Deviation of the residual at each frequency, relative to the geometric mean over all frequencies."""
        deviation = self.spectrum.sqrt()
        return deviation / deviation.log().mean().exp()

    def _scale(self, images: Tensor) -> Tensor:
        return self.residual_scale.to(images.device).view(1, -1, *[1] * (images.dim() - 2))


def _filter(images: Tensor, gains: Tensor) -> Tensor:
    """Images (B, C, H, W) with each frequency of `rfftn` multiplied by its gain."""
    axes = tuple(range(2, images.dim()))
    with torch.autocast(images.device.type, enabled=False):
        spectrum = torch.fft.rfftn(images.float(), dim=axes) * gains.to(images.device)
        filtered: Tensor = torch.fft.irfftn(spectrum, s=images.shape[2:], dim=axes)
        return filtered


def _rotate(images: Tensor, others: Tensor, angle: Tensor) -> Tensor:
    """cos θ · images + sin θ · others, each (B, C, H, W), with an angle for each frequency of `rfftn`."""
    return _filter(images, angle.cos()) + _filter(others, angle.sin())


def build_network(
    params: config.Refiner, image_shape: tuple[int, ...], num_classes: int, space: ConditionSpace | None = None
) -> VelocityNetwork:
    """Build the untrained network for images (C, H, W) or volumes (C, D, H, W)."""
    (channels, *sides), patch = image_shape, patch_size(image_shape)
    pixels = patch ** len(sides)
    shape = (channels * pixels, *(side // patch for side in sides))
    return VelocityNetwork(
        shape,
        num_classes,
        params.channels,
        params.blocks,
        params.dropout,
        context_channels=shape[0] + (0 if space is None else space.map_channels * pixels),
        has_noise_level=True,
        smallest_side=min(8, min(shape[1:]) // 4),
        attention_side=ATTENTION_SIDE[len(sides)],
        num_values=0 if space is None else space.size,
    )


def patch_size(image_shape: tuple[int, ...]) -> int:
    """Side of a patch: the largest of `PATCH_SIDES` that divides all sides and leaves a grid of `GRID_SIDE`, else 1."""
    _, *sides = image_shape
    least = GRID_SIDE[len(sides)]
    fitting = (
        patch
        for patch in PATCH_SIDES[len(sides)]
        if all(side % patch == 0 and side // patch >= least for side in sides)
    )
    return next(fitting, 1)


def save_refiner(folder: Path, refiner: Refiner, model: str) -> None:
    """Write refiner.safetensors and refiner.json; `model` is the SHA-256 of its decoder's weights."""
    network = {f"network.{name}": tensor for name, tensor in refiner.network.state_dict().items()}
    statistics = {name: getattr(refiner, name) for name in STATISTICS}
    description = {
        "enabled": True,
        "schema": SCHEMA,
        "model": model,
        "image_shape": refiner.image_shape,
        "num_classes": refiner.num_classes,
        "refiner": refiner.params.model_dump(mode="json"),
    }
    if refiner.space is not None:
        description["conditions"] = refiner.space.dump()
    save_artifact(folder, "refiner", {**network, **statistics}, description)


def save_disabled(folder: Path, model: str) -> None:
    """Write a refiner.json that says that the model with the SHA-256 `model` has no refiner."""
    write_folder(folder, {DESCRIPTION: to_json({"enabled": False, "model": model})})


def load_refiner(folder: Path, model: str, device: torch.device | str = "cpu") -> Refiner | None:
    """Load the refiner of the model whose weights have the SHA-256 `model`; None if refinement is disabled.

    Raises:
        UserError: the files are missing or damaged, or belong to another model.
    """
    path, command = folder / DESCRIPTION, "medgen refiner"
    meta = read_description(folder, "refiner", command)
    with parsing(path, command):
        trained_for, enabled, schema = meta["model"], meta["enabled"], meta.get("schema", 1)
        if trained_for != model:
            raise UserError(
                f"{folder}: made for model {str(trained_for)[:12]}, expected model {model[:12]}; run `{command}` again"
            )
        if not enabled:
            return None
        if schema != SCHEMA:
            raise UserError(f"{path}: found schema {schema}, expected {SCHEMA}; run `{command}` again")
        params = config.Refiner.model_validate(meta["refiner"])
        tensors = read_tensors(folder, "refiner", command, meta["sha256"])
        image_shape, num_classes = tuple(meta["image_shape"]), meta["num_classes"]
        space = ConditionSpace.load(meta.get("conditions", []))
        network = load_network(lambda: build_network(params, image_shape, num_classes, space), tensors)
        scale, spectrum, latent_scale, gain = (tensors[name] for name in STATISTICS)
    sizes = (network.to(device), params, image_shape, num_classes)
    return Refiner(*sizes, scale, spectrum, latent_scale, gain, space)
