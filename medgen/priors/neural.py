"""Base class of priors that are networks: creation, sampling and storage."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from medgen import config
from medgen.config import seed_of
from medgen.data.conditions import ConditionSpace
from medgen.nn.conditions import Conditions
from medgen.priors.axes import LatentArray

_SETTINGS = ("channels", "blocks", "dropout", "sampling_steps", "solver", "guidance")  # stored parameters


class NeuralPrior(ABC):
    """A prior with a network; `medgen/training/prior.py` trains it with the loop that trains models.

    Args:
        latent_shape: of one latent.
        buffers: tensors by name that are not trained, on the CPU; `frequencies` (num_classes,) is among them.
        network: made by `build_network`.
        params: the parameters.
        space: conditions besides the class that the network takes; None for none.
    """

    name: ClassVar[str]

    def __init__(
        self,
        latent_shape: tuple[int, ...],
        buffers: Mapping[str, Tensor],
        network: nn.Module,
        params: config.Prior,
        space: ConditionSpace | None = None,
    ) -> None:
        self.latent_shape = latent_shape
        self.buffers = dict(buffers)
        self.frequencies = buffers["frequencies"]
        self.conditional = conditioning_classes(params, self.frequencies) > 0
        self.network = network
        self.params = params
        self.space = space

    @classmethod
    @abstractmethod
    def create(
        cls,
        latents: LatentArray,
        labels: Tensor | None,
        num_classes: int,
        params: config.Prior,
        variance: Tensor | None = None,
        codebook: Tensor | None = None,
        space: ConditionSpace | None = None,
    ) -> Self:
        """Return an untrained prior with the statistics of the train split: latent scales, class frequencies.

        Args:
            latents, labels, num_classes, params, variance: as in `medgen.priors.AnalyticPrior.fit`.
            codebook: (K, Z) vectors that latents (N, Z, h, w) are made of; None for models without a codebook.
            space: conditions besides the class, which are not used unless `params.conditional`; None for none.

        Raises:
            UserError: the latents are not finite, do not vary, or (tokens) are not made of codes.
        """

    @abstractmethod
    def loss(
        self, latents: Tensor, labels: Tensor, generator: torch.Generator, conditions: Conditions | None = None
    ) -> Tensor:
        """Training loss, a scalar.

        The network stays in its mode, so that dropout follows the caller's choice.

        Args:
            latents: (B, *latent_shape), on the network's device.
            labels: (B,), -1 where unlabelled, on the same device.
            generator: source of all randomness but dropout's, on the CPU.
            conditions: of the latents' images, on the same device; None without any.
        """

    @staticmethod
    @abstractmethod
    def build_network(
        latent_shape: tuple[int, ...],
        buffers: Mapping[str, Tensor],
        params: config.Prior,
        space: ConditionSpace | None = None,
    ) -> nn.Module:
        """Build the untrained network."""

    @abstractmethod
    def _sample(
        self, labels: Tensor, conditions: Conditions | None, generator: torch.Generator, device: torch.device
    ) -> Tensor:
        """Latents (n, *latent_shape) on the CPU for labels (n,), -1 for none; the network is in evaluation mode."""

    @classmethod
    def initialise(
        cls,
        latent_shape: tuple[int, ...],
        buffers: Mapping[str, Tensor],
        params: config.Prior,
        space: ConditionSpace | None = None,
    ) -> Self:
        """Return a prior whose network has random weights, the same for the same seed."""
        space = space if params.conditional else None
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(params.seed))
            network = cls.build_network(latent_shape, buffers, params, space)
        return cls(latent_shape, buffers, network, params, space)

    @torch.no_grad()
    def sample(
        self, n: int, labels: Tensor | None, generator: torch.Generator, conditions: Conditions | None = None
    ) -> Tensor:
        """`n` latents (n, *latent_shape) of the classes `labels` (n,), or of the train split's mix.

        `conditions` are of the n images, on the CPU; None if they are unknown.

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
            device = next(self.network.parameters()).device
            if self.space is None:
                return self._sample(labels, None, generator, device)
            return self._sample(labels, conditions or Conditions.unknown(self.space, n), generator, device)
        finally:
            self.network.train(training)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values for `restore`."""
        weights = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in {**self.buffers, **weights}.items()}
        settings = {name: getattr(self.params, name) for name in _SETTINGS}
        meta = {"latent_shape": list(self.latent_shape), "conditional": self.conditional, "prior": settings}
        if self.space is not None:
            meta |= {"conditional": True, "conditions": self.space.dump()}
        return tensors, meta

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        """Return the prior that `state` describes."""
        latent_shape = tuple(meta["latent_shape"])
        params = config.Prior(name=cls.name, conditional=meta["conditional"], **meta["prior"])
        buffers = {name: tensor for name, tensor in tensors.items() if not name.startswith("network.")}
        space = ConditionSpace.load(meta.get("conditions", []))
        network = load_network(lambda: cls.build_network(latent_shape, buffers, params, space), tensors)
        return cls(latent_shape, buffers, network, params, space)


def load_network(build: Callable[[], nn.Module], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Build a network with the weights `network.NAME` of `tensors`, in evaluation mode on the CPU.

    Raises:
        KeyError, RuntimeError: weights are missing or have other shapes.
    """
    with torch.device("meta"):  # no memory and no time for random weights
        network = build()
    network.load_state_dict({name: tensors[f"network.{name}"] for name in network.state_dict()}, assign=True)
    return network.eval()


def conditioning_classes(params: config.Prior, frequencies: Tensor) -> int:
    """Number of classes that a prior is conditioned on; 0 for an unconditional one or unlabelled data."""
    return len(frequencies) if params.conditional else 0
