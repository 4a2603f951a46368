"""What priors that are networks share: how they are told classes, drawn from, and kept.

Labels are dropped now and then in training, so that a label's strength can be chosen when sampling (Ho & Salimans
2022).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from medgen import config
from medgen.config import seed_of

LABEL_DROPOUT = 0.1
_SETTINGS = {"channels", "blocks", "dropout", "sampling_steps", "solver", "guidance"}


class NetworkPrior(ABC):
    """A network, and what is known of the latents without it.

    Args:
        latent_shape: of one latent.
        known: tensors by name that are not learnt, on the CPU; `frequencies` (num_classes,) is among them.
        network: as `build` makes it.
        prior: the parameters.
    """

    name: ClassVar[str]

    def __init__(
        self, latent_shape: tuple[int, ...], known: Mapping[str, Tensor], network: nn.Module, prior: config.Prior
    ) -> None:
        self.latent_shape = latent_shape
        self.known = dict(known)
        self.frequencies = known["frequencies"]
        self.conditional = tells_classes(prior, self.frequencies)
        self.network = network
        self.prior = prior

    @staticmethod
    @abstractmethod
    def build(
        latent_shape: tuple[int, ...], known: Mapping[str, Tensor], num_classes: int, prior: config.Prior
    ) -> nn.Module:
        """The network, untrained; `num_classes` is 0 where it is not told them."""

    @abstractmethod
    def _draw(self, labels: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
        """Latents (n, *latent_shape) on the CPU of labels (n,), -1 for none; the network is in evaluation mode."""

    @classmethod
    def begin(cls, latent_shape: tuple[int, ...], known: Mapping[str, Tensor], prior: config.Prior) -> Self:
        """With a network of random weights, the same for the same seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(prior.seed))
            network = cls.build(latent_shape, known, _num_classes(known, prior), prior)
        return cls(latent_shape, known, network, prior)

    def told(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Labels (B,) as a training step is told them: now and then, or always where it knows no classes, -1."""
        dropped = (torch.rand(len(labels), generator=generator) < LABEL_DROPOUT).to(labels.device)
        return labels.masked_fill(dropped, -1) if self.conditional else torch.full_like(labels, -1)

    @torch.no_grad()
    def sample(self, n: int, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        """`n` latents (n, *latent_shape) of the classes `labels` (n,), or of the train split's mix.

        Raises:
            ValueError: no training image has one of the labels.
        """
        if labels is None or not self.conditional:
            labels = torch.full((n,), -1)
        known = (self.frequencies > 0).nonzero()[:, 0].tolist()
        missing = sorted(set(labels.tolist()) - {-1, *known})
        if missing:
            raise ValueError(f"labels: found {missing}, expected classes with training images: {known}")
        training = self.network.training
        self.network.eval()
        try:
            return self._draw(labels, generator, next(self.network.parameters()).device)
        finally:
            self.network.train(training)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values that `restore` takes."""
        learnt = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in {**self.known, **learnt}.items()}
        settings = self.prior.model_dump(mode="json", include=_SETTINGS)
        return tensors, {"latent_shape": list(self.latent_shape), "conditional": self.conditional, "prior": settings}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        """The prior whose `state` this is."""
        latent_shape = tuple(meta["latent_shape"])
        prior = config.Prior(name=cls.name, conditional=meta["conditional"], **meta["prior"])
        known = {name: tensor for name, tensor in tensors.items() if not name.startswith("network.")}
        with torch.device("meta"):  # no random weights that would be overwritten
            network = cls.build(latent_shape, known, _num_classes(known, prior), prior)
        network = network.to_empty(device="cpu")
        network.load_state_dict({name: tensors[f"network.{name}"] for name in network.state_dict()})
        return cls(latent_shape, known, network.eval(), prior)


def tells_classes(prior: config.Prior, frequencies: Tensor) -> bool:
    """Whether there are classes, and they are to be told apart."""
    return prior.conditional and len(frequencies) > 0


def _num_classes(known: Mapping[str, Tensor], prior: config.Prior) -> int:
    return len(known["frequencies"]) if tells_classes(prior, known["frequencies"]) else 0
