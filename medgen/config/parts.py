"""Sections `features`, `prior` and `refiner`: what is trained besides the model."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from medgen.config.base import Count, Depth, FamilySection, Fraction, NonNegative, Positive, Section, Seed, Width


class Features(Section):
    """Domain extractor: a small classifier trained on the train split."""

    width: Width = 16  # channels after the first convolution
    epochs: Count = 10
    batch_size: Count = 16
    learning_rate: Positive = 3e-3
    seed: Seed = 0


_NETWORK = frozenset(
    {"channels", "blocks", "epochs", "batch_size", "learning_rate", "dropout", "sampling_steps", "guidance"}
)


class Prior(FamilySection):
    """Distribution of the latents."""

    name: str | None = None  # None: tokens for models with a codebook, gmm for others
    conditional: bool = True  # on the class, if the dataset has labels
    seed: Seed = 0
    components: tuple[Count, ...] = (1, 2, 4, 8, 16, 32)  # gmm: candidates; the best held-out likelihood wins
    variance_kept: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95  # gmm: fraction of the latent variance in the mixture
    # flow and tokens are networks, trained on the latents in epochs of 100 steps
    channels: Annotated[int, Field(ge=8, le=1 << 16, multiple_of=8)] = 64  # width of the network
    blocks: Depth = 4  # residual blocks (flow), transformer blocks (tokens)
    epochs: Count = 20
    batch_size: Count = 64
    learning_rate: Positive = 1e-3
    dropout: Fraction = 0.1
    sampling_steps: Annotated[int, Field(ge=1, le=1000)] | None = None  # None: 25 (flow), 10 (tokens)
    solver: Literal["euler", "midpoint"] = "midpoint"  # flow: midpoint evaluates the network twice a step
    guidance: NonNegative = 1.0  # classifier-free guidance (Ho & Salimans 2022); 1: plain conditioning, 0: none

    family_keys: ClassVar = {
        "normal": frozenset(),
        "gaussian": frozenset(),
        "gmm": frozenset({"components", "variance_kept"}),
        "flow": _NETWORK | {"solver"},
        "tokens": _NETWORK,
    }


class Refiner(Section):
    """Flow on pixels that draws the detail which the decoder leaves out."""

    enabled: bool = False
    seed: Seed = 0
    conditional: bool = True  # on the class, if the dataset has labels
    channels: Annotated[int, Field(ge=8, le=1 << 16, multiple_of=8)] = 32  # width of the network
    blocks: Depth = 4  # residual blocks: half on the smallest grid, a quarter on each larger one, down and up
    dropout: Fraction = 0.0
    # largest noise on the latents in training, in their standard deviations; the refiner draws the detail that noise
    # hides, and so also repairs errors of the prior
    latent_noise: NonNegative = 1.0
    epochs: Count = 20
    batch_size: Count = 8  # over all processes
    learning_rate: Positive = 2e-3
    ema_decay: Fraction = 0.999
    horizontal_flip: bool = False  # off by default, since it mirrors the heart
    # sampling, which does not need a new training
    sampling_steps: Annotated[int, Field(ge=1, le=1000)] = 4
    solver: Literal["euler", "midpoint"] = "midpoint"  # midpoint evaluates the network twice a step
    sampling_noise: NonNegative = 0.5  # noise on the latent of a sample, at most latent_noise
    guidance: NonNegative = 1.0  # classifier-free guidance (Ho & Salimans 2022); 1: plain conditioning, 0: none

    @model_validator(mode="after")
    def _sampling_noise_is_within_training_noise(self) -> Self:
        if self.sampling_noise > self.latent_noise:
            raise ValueError(
                f"sampling_noise: found {self.sampling_noise:g}, expected at most latent_noise, {self.latent_noise:g}"
            )
        return self
