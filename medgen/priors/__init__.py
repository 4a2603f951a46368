"""What latents are drawn from when a model generates. A new prior is one file and one line in PRIORS.

prior = FITTED["gmm"].fit(latents, labels, num_classes, params.prior, variance)
images = sample_images(prior, model, n=25, labels=None, seed=0)  # (25, C, H, W)

Shapes: as in medgen/models/base.py, and D numbers in a flattened latent.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from medgen import config
from medgen.config import seed_of, unknown_name
from medgen.errors import UserError
from medgen.io import write_folder
from medgen.models.base import Decoder
from medgen.models.bundle import class_index
from medgen.priors.flow import Flow
from medgen.priors.gaussian import Gaussian, Normal
from medgen.priors.gmm import GaussianMixture
from medgen.priors.learned import NetworkPrior
from medgen.priors.tokens import Tokens


class ImageRefiner(Protocol):
    """All that sampling needs of a refiner."""

    def draw(self, decoder: Decoder, latents: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        """A prior's latents (B, ...), decoded and refined: images (B, C, H, W) in [0, 1]."""
        ...


class Prior(Protocol):
    """What latents are drawn from: a density over them that was fitted to the train split."""

    name: ClassVar[str]
    latent_shape: tuple[int, ...]
    frequencies: Tensor  # (num_classes,) share of each class in the train split; empty where unlabelled

    @property
    def conditional(self) -> bool:
        """Whether a label changes what is drawn."""
        ...

    def sample(self, n: int, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        """`n` latents (n, *latent_shape), float32 on the CPU, of the classes `labels` (n,) or of the train mix."""
        ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values that `restore` takes."""
        ...

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        """The prior whose `state` this is."""
        ...


class FittedPrior(Prior, Protocol):
    """A prior that is found by calculation, and knows the density of a latent."""

    @classmethod
    def fit(
        cls,
        latents: Tensor,
        labels: Tensor | None,
        num_classes: int,
        prior: config.Prior,
        variance: Tensor | None = None,
        patients: Sequence[str] | None = None,
    ) -> Self:
        """Fits the aggregate posterior q(z) = E_x q(z|x), which the decoder was trained on.

        It is the density of the encoder's means with the posterior's own spread on top. Taking the
        spread's mean over the images instead of drawing from each posterior leaves the principal
        axes free of its noise.

        Args:
            latents: (N, *latent_shape) posterior means.
            labels: (N,) int64, -1 where unlabelled; None for unlabelled data.
            num_classes: how many classes there are.
            prior: the parameters.
            variance: (*latent_shape) posterior variance, mean over the images; None for deterministic encoders.
            patients: N patients, whose images a held-out part keeps together; None where they are unknown.

        Raises:
            UserError: the latents are not finite, or (gmm) do not vary.
        """
        ...

    def log_likelihood(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Log density in nats (N,) of posterior means (N, *latent_shape), given labels (N,) where there are any."""
        ...


class LearnedPrior(Prior, Protocol):
    """A prior that is a network; `medgen/training/prior.py` trains it with the loop that trains models."""

    network: nn.Module

    @classmethod
    def start(
        cls,
        latents: Tensor,
        labels: Tensor | None,
        num_classes: int,
        prior: config.Prior,
        variance: Tensor | None = None,
        codebook: Tensor | None = None,
    ) -> Self:
        """The prior before its training, with what is known by then: scales of the latents, sizes, class shares.

        Args:
            latents, labels, num_classes, prior, variance: as of `FittedPrior.fit`.
            codebook: (num_codes, Z) vectors that latents (N, Z, h, w) are made of, where they are.

        Raises:
            UserError: the latents are not finite, do not vary, or (tokens) are not made of codes.
        """
        ...

    def loss(self, latents: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """What training lowers, a scalar, on latents (B, *latent_shape) and labels (B,), -1 where unlabelled.

        Both are on the network's device. All that is random comes from `generator`, of the CPU, and from the
        network's dropout: the network's mode is left as it is.
        """
        ...


FITTED: dict[str, type[FittedPrior]] = {"normal": Normal, "gaussian": Gaussian, "gmm": GaussianMixture}
LEARNED: dict[str, type[LearnedPrior]] = {"flow": Flow, "tokens": Tokens}
PRIORS: dict[str, type[Prior]] = {**FITTED, **LEARNED}


def save_prior(folder: Path, prior: Prior, model: str) -> None:
    """Writes prior.safetensors and prior.json; `model` is the SHA-256 of the weights whose latents it was fitted to."""
    tensors, meta = prior.state()
    weights = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    plain = {"name": prior.name, "sha256": hashlib.sha256(weights).hexdigest(), "model": model, **meta}
    files = {"prior.safetensors": weights, "prior.json": (json.dumps(plain, indent=2) + "\n").encode()}
    write_folder(folder, files)


def load_prior(folder: Path, model: str, device: torch.device | str = "cpu") -> Prior:
    """Reads what `save_prior` wrote, for the model whose weights have the SHA-256 `model`; a network is on `device`.

    Raises:
        UserError: there is no prior, it is damaged, or it was fitted to another model's latents.
    """
    path = folder / "prior.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        weights = (folder / "prior.safetensors").read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no prior here; run `medgen prior` (or `dvc repro`) first") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a prior's description ({error}); run `medgen prior` again") from None
    if meta.get("name") not in PRIORS:
        raise unknown_name(f"{path}: name", str(meta.get("name")), PRIORS)
    if meta.get("sha256") != hashlib.sha256(weights).hexdigest():
        raise UserError(f"{folder / 'prior.safetensors'}: not the file prior.json describes; run `medgen prior` again")
    try:
        prior = PRIORS[meta["name"]].restore(safetensors.torch.load(weights), meta)
        if isinstance(prior, NetworkPrior):
            prior.network.to(device)
        fitted_to = meta["model"]
    except (SafetensorError, KeyError, RuntimeError, TypeError, ValidationError) as error:
        raise UserError(f"{path}: incomplete ({error}); run `medgen prior` again") from None
    if fitted_to != model:
        raise UserError(
            f"{folder}: fitted to model {fitted_to[:12]}, the model here is {model[:12]}; run `medgen prior` again"
        )
    return prior


def tells_classes_apart(prior: Prior, model: Decoder) -> bool:
    """Whether a label changes what is generated."""
    return len(prior.frequencies) > 0 and (prior.conditional or model.conditional)


def find_label(label: str, classes: Sequence[str], prior: Prior, model: Decoder) -> int:
    """The index of a class, given by its name or its index, to draw images of.

    Raises:
        UserError: there is no such class, or neither prior nor model tells classes apart.
    """
    if not classes:
        raise UserError(f"label: found {label!r}, but the model was trained on images without labels; leave it out")
    index = class_index(label, classes)
    if not tells_classes_apart(prior, model):
        raise UserError(
            f"label: found {label!r}, but prior {prior.name!r} does not tell classes apart; "
            "leave it out, or run `medgen prior --set prior.name=gmm --set prior.conditional=true`"
        )
    if bool(prior.frequencies[index] == 0):
        raise UserError(f"label: the train split has no image of {classes[index]!r}; choose another class")
    return index


def draw_labels(prior: Prior, model: Decoder, n: int, generator: torch.Generator) -> Tensor | None:
    """Labels (n,) int64 by their frequency in the train split; None where a label would mean nothing."""
    if not tells_classes_apart(prior, model):
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
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches of new images (b, C, H, W) in [0, 1] and their labels (b,), on the CPU, `n` images in all.

    The same seed and batch size give the same images, and with a refiner the same images refined. Without `labels` (n,)
    they are drawn by frequency.
    """
    generator = torch.Generator().manual_seed(seed)
    refiner_generator = torch.Generator().manual_seed(seed_of(seed, 1))  # its draws leave those of latents as they are
    if labels is None:
        labels = draw_labels(prior, model, n, generator)
    device = next(model.parameters()).device if isinstance(model, nn.Module) else torch.device("cpu")
    for start in range(0, n, batch_size):
        chosen = None if labels is None else labels[start : start + batch_size]
        latents = prior.sample(min(batch_size, n - start), chosen, generator).to(device)
        given = None if chosen is None else chosen.to(device)
        with torch.no_grad():
            if refiner is None:
                images = model.decode(latents, given)
            else:
                images = refiner.draw(model, latents, given, refiner_generator)
        yield images.float().cpu(), chosen


def sample_images(
    prior: Prior,
    model: Decoder,
    n: int,
    labels: Tensor | None,
    seed: int,
    batch_size: int = 64,
    refiner: ImageRefiner | None = None,
) -> Tensor:
    """`n` new images (n, C, H, W) in [0, 1] on the CPU; see `iterate_samples`."""
    return torch.cat([images for images, _ in iterate_samples(prior, model, n, labels, seed, batch_size, refiner)])
