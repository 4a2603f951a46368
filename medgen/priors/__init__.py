"""Distributions that latents are drawn from to generate images. A new prior is one file and one entry here.

prior = ANALYTIC["gmm"].fit(latents, labels, num_classes, params.prior, variance)
images = sample_images(prior, model, n=25, labels=None, seed=0)  # (25, C, H, W)

Shapes: as in medgen/models/base.py; N images in a split.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medgen import config
from medgen.config import seed_of, unknown_name
from medgen.data.conditions import ConditionField, ConditionSpace, parse_request
from medgen.errors import UserError
from medgen.io import parsing, read_description, read_tensors, save_artifact
from medgen.models.base import Decoder
from medgen.models.bundle import class_index
from medgen.nn.conditions import ConditionArray, Conditions, encode_map
from medgen.priors.axes import LatentArray
from medgen.priors.flow import Flow
from medgen.priors.gaussian import Gaussian, Normal
from medgen.priors.gmm import GaussianMixture
from medgen.priors.neural import NeuralPrior
from medgen.priors.tokens import Tokens


class ImageRefiner(Protocol):
    """The part of a refiner that sampling needs."""

    def sample(
        self,
        decoder: Decoder,
        latents: Tensor,
        labels: Tensor | None,
        generator: torch.Generator,
        conditions: Conditions | None = None,
    ) -> Tensor:
        """Decode and refine a prior's latents (B, *latent_shape): images (B, C, H, W) in [0, 1]."""
        ...


class Prior(Protocol):
    """A density over latents, fitted to the train split."""

    name: ClassVar[str]
    latent_shape: tuple[int, ...]
    frequencies: Tensor  # (num_classes,) share of each class in the train split; empty for unlabelled data

    @property
    def conditional(self) -> bool:
        """True if samples depend on the label."""
        ...

    def sample(self, n: int, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        """`n` latents (n, *latent_shape), float32 on the CPU, of the classes `labels` (n,) or of the train mix."""
        ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values for `restore`."""
        ...

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        """Return the prior that `state` describes."""
        ...


class AnalyticPrior(Prior, Protocol):
    """A prior that is computed in closed form or by EM, with a density that can be evaluated."""

    @classmethod
    def fit(
        cls,
        latents: LatentArray,
        labels: Tensor | None,
        num_classes: int,
        params: config.Prior,
        variance: Tensor | None = None,
        patients: Sequence[str] | None = None,
    ) -> Self:
        """Fit the aggregate posterior q(z) = E_x q(z|x), on which the decoder was trained.

        It is the density of the encoder's means plus the posterior's own spread. Using the mean spread over all images
        instead of draws from each posterior keeps its noise out of the principal axes.

        Args:
            latents: (N, *latent_shape) posterior means, in memory or on disk.
            labels: (N,) int64, -1 where unlabelled; None for unlabelled data.
            num_classes: number of classes.
            params: the parameters.
            variance: (*latent_shape) posterior variance, mean over the images; None for deterministic encoders.
            patients: N patients; a held-out part has all images of a patient or none. None if they are unknown.

        Raises:
            UserError: the latents are not finite, or (gmm) do not vary.
        """
        ...

    def log_likelihood(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Log density in nats (N,) of posterior means (N, *latent_shape), given labels (N,) if there are any."""
        ...


ANALYTIC: dict[str, type[AnalyticPrior]] = {"normal": Normal, "gaussian": Gaussian, "gmm": GaussianMixture}
NEURAL: dict[str, type[NeuralPrior]] = {"flow": Flow, "tokens": Tokens}
PRIORS: dict[str, type[Prior]] = {**ANALYTIC, **NEURAL}


def save_prior(folder: Path, prior: Prior, model: str) -> None:
    """Write prior.safetensors and prior.json; `model` is the SHA-256 of the weights of the prior's model."""
    tensors, meta = prior.state()
    save_artifact(folder, "prior", tensors, {"name": prior.name, "model": model, **meta})


def load_prior(folder: Path, model: str, device: torch.device | str = "cpu") -> Prior:
    """Load the prior of the model whose weights have the SHA-256 `model`; a network is moved to `device`.

    Raises:
        UserError: the files are missing or damaged, or belong to another model.
    """
    path, command = folder / "prior.json", "medgen prior"
    meta = read_description(folder, "prior", command)
    if (name := str(meta.get("name"))) not in PRIORS:
        raise unknown_name(f"{path}: name", name, PRIORS)
    with parsing(path, command):
        fitted_to = meta["model"]
        tensors = read_tensors(folder, "prior", command, meta["sha256"])
        prior = PRIORS[name].restore(tensors, meta)
        if isinstance(prior, NeuralPrior):
            prior.network.to(device)
    if fitted_to != model:
        raise UserError(
            f"{folder}: fitted to model {str(fitted_to)[:12]}, expected model {model[:12]}; run `{command}` again"
        )
    return prior


def is_conditional(prior: Prior, model: Decoder) -> bool:
    """True if generated images depend on the label."""
    return len(prior.frequencies) > 0 and (prior.conditional or model.conditional)


def takes_conditions(prior: Prior, model: Decoder) -> bool:
    """True if generated images depend on conditions besides the label."""
    return model.space is not None or (isinstance(prior, NeuralPrior) and prior.space is not None)


def find_label(label: str, classes: Sequence[str], prior: Prior, model: Decoder) -> int:
    """Index of the class, given by its name or index, to generate images of.

    Raises:
        UserError: the class is unknown or has no training image, or generation is unconditional.
    """
    if not classes:
        raise UserError(f"label: found {label!r}, but the model was trained on images without labels; leave it out")
    index = class_index(label, classes)
    if not is_conditional(prior, model):
        raise UserError(
            f"label: found {label!r}, but neither prior {prior.name!r} nor the model is conditional; "
            "leave it out, or run `medgen prior --set prior.name=gmm --set prior.conditional=true`"
        )
    if bool(prior.frequencies[index] == 0):
        raise UserError(f"label: the train split has no image of {classes[index]!r}; choose another class")
    return index


def find_conditions(
    request: str | Mapping[str, object],
    space: ConditionSpace | None,
    prior: Prior,
    model: Decoder,
    read_map: Callable[[ConditionField, Any], NDArray[np.uint8]],
) -> Conditions | None:
    """Conditions of a single image to generate; None if nothing is requested.

    Args:
        request: values by name, or a text such as view=AP,sex=F; conditions that are left out are unknown.
        space: conditions of the model's dataset; None without any.
        prior, model: the prior and the model.
        read_map: returns the class numbers of a requested mask, or the grey values of a requested image, (1, H, W).

    Raises:
        UserError: a name or a value is unknown, or generation does not depend on conditions.
    """
    wanted = dict(parse_request(request) if isinstance(request, str) else request)
    if not wanted:
        return None
    if space is None:
        raise UserError(
            "condition: the model was trained without conditions; leave it out, or set preprocess.conditions and run "
            "all stages again"
        )
    if not takes_conditions(prior, model):
        raise UserError(
            f"condition: neither prior {prior.name!r} nor the model depends on conditions; leave it out, or run "
            "`medgen prior --set prior.name=flow --set prior.conditional=true`"
        )
    stored = {
        name: torch.from_numpy(read_map(field, wanted.pop(name)))[None]
        for name, (field, _) in space.map_fields.items()
        if name in wanted
    }
    maps = Conditions.unknown(space, 1).maps
    if maps is not None and stored:
        maps = maps.new_zeros(1, space.map_channels, *next(iter(stored.values())).shape[2:])
        for name, values in stored.items():
            field, place = space.map_fields[name]
            maps[:, place] = encode_map(field, values, torch.ones(1))
    return Conditions(torch.tensor([space.encode_request(wanted)]).view(1, space.size), maps)


def draw_labels(prior: Prior, model: Decoder, n: int, generator: torch.Generator) -> Tensor | None:
    """Labels (n,) int64 drawn by their frequency in the train split; None if generation is unconditional."""
    if not is_conditional(prior, model):
        return None
    return torch.multinomial(prior.frequencies, n, replacement=True, generator=generator)


def iterate_samples(
    prior: Prior,
    model: Decoder,
    n: int,
    labels: Tensor | None,
    seed: int,
    batch_size: int = 64,
    refiner: ImageRefiner | None = None,
    rank: int = 0,
    world: int = 1,
    conditions: ConditionArray | None = None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield batches of new images (b, C, H, W) in [0, 1] and their labels (b,), on the CPU, `n` images in all.

    The same seed and batch size give the same images; a refiner refines those same images. Each batch has its own
    generator, so process `rank` of `world` draws only its contiguous part of the batches. Without `labels` (n,), they
    are drawn by frequency. `conditions` of the n images are unknown if they are None.
    """
    if labels is None:
        labels = draw_labels(prior, model, n, torch.Generator().manual_seed(seed))
    device = next(model.parameters()).device if isinstance(model, nn.Module) else torch.device("cpu")
    num_batches = math.ceil(n / batch_size)
    for number in range(rank * num_batches // world, (rank + 1) * num_batches // world):
        # two generators: the refiner's draws do not change those of latents
        generators = [torch.Generator().manual_seed(seed_of(seed, part, number)) for part in (0, 1)]
        start = number * batch_size
        batch_labels = None if labels is None else labels[start : start + batch_size]
        own = None if conditions is None else conditions[torch.arange(start, min(start + batch_size, n))]
        count, generator = min(batch_size, n - start), generators[0]
        if isinstance(prior, NeuralPrior):
            latents = prior.sample(count, batch_labels, generator, own).to(device)
        else:
            latents = prior.sample(count, batch_labels, generator).to(device)
        device_labels = None if batch_labels is None else batch_labels.to(device)
        with torch.no_grad():
            if refiner is None:
                images = model.decode(latents, device_labels, own)
            else:
                images = refiner.sample(model, latents, device_labels, generators[1], own)
        yield images.float().cpu(), batch_labels


def sample_images(
    prior: Prior,
    model: Decoder,
    n: int,
    labels: Tensor | None,
    seed: int,
    batch_size: int = 64,
    refiner: ImageRefiner | None = None,
    conditions: ConditionArray | None = None,
) -> Tensor:
    """Generate `n` images (n, C, H, W) in [0, 1] on the CPU; see `iterate_samples`."""
    batches = iterate_samples(prior, model, n, labels, seed, batch_size, refiner, conditions=conditions)
    return torch.cat([images for images, _ in batches])
