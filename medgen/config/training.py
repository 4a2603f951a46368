"""Sections `loss` and `train`."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from medgen.config.base import Count, Fraction, NonNegative, Positive, Section, Seed, Width, without_defaults


class Beta(Section):
    """Weight of the KL term during a phase."""

    schedule: Literal["constant", "linear", "cyclical"] = "constant"
    start: NonNegative = 0.0  # linear, cyclical: value at the beginning
    end: NonNegative = 0.0  # the value itself for constant
    epochs: Count = 1  # linear: length of the ramp; cyclical: length of one cycle


class Schedule(Section):
    """Factor of the phase's learning rate."""

    name: Literal["constant", "cosine_restarts", "plateau"] = "constant"
    period: Count = 10  # cosine_restarts: epochs to the first restart
    period_factor: Count = 1  # cosine_restarts: each period is this many times the last
    min_factor: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5  # plateau: factor of each reduction
    patience: Count = 5  # plateau: epochs without a lower val/objective


class Weights(Section):
    """Weights of the image terms; each term is a mean over pixels."""

    l1: NonNegative = 0.0
    mse: NonNegative = 0.0
    bce: NonNegative = 0.0
    ssim: NonNegative = 0.0  # of 1 - SSIM
    perceptual: NonNegative = 0.0  # VGG16 features; needs `medgen weights fetch vgg16`
    sigma: NonNegative = 0.0  # Gaussian likelihood with its optimal variance, which needs β = 1
    dice: NonNegative = 0.0  # of 1 - Dice, for masks

    @model_validator(mode="after")
    def _some_weight_is_positive(self) -> Self:
        if not any(self.model_dump().values()):
            raise ValueError("no term has a weight; expected at least one above 0, such as {l1: 1.0}")
        return self


class Loss(Section):
    """The objective. β is set for each phase."""

    weights: Weights = Weights(l1=1.0, ssim=0.5)
    # elbo: β·KL/(C·H·W), so that β = 1 is the evidence lower bound; sum: β·KL; mean: β·KL/D
    kl_reduction: Literal["elbo", "sum", "mean"] = "elbo"
    free_bits: NonNegative = 0.0  # nats per latent channel without cost
    commitment_cost: NonNegative = 0.25  # vqvae: weight of the commitment term

    renamed: ClassVar = {"commitment": "commitment_cost"}


class Phase(Section):
    """A phase of training, with its own optimizer."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][\w -]*$")]
    epochs: Annotated[int, Field(ge=0, le=10**9)]
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: Positive = 1e-4
    weight_decay: NonNegative = 1e-5
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 0
    schedule: Schedule = Schedule()
    beta: Beta = Beta()
    weights: Weights | None = None  # replaces loss.weights during this phase


class Affine(Section):
    """Random rotation, shift and scaling; what comes from outside the image is black, and class 0 in a mask."""

    degrees: Annotated[float, Field(ge=0.0, le=180.0)] = 0.0  # largest rotation, in both directions
    translate: Fraction = 0.0  # largest shift, as a fraction of the side
    scale: Fraction = 0.0  # the factor is drawn between 1 - scale and 1 + scale


class Elastic(Section):
    """Random smooth deformation: shifts drawn for each pixel and smoothed (Simard et al. 2003)."""

    alpha: NonNegative = 0.0  # size of the shifts, as in torchvision's ElasticTransform; 0: none
    sigma: Positive = 5.0  # pixels over which the shifts are smoothed (standard deviation)


class Intensity(Section):
    """Random grey values; masks keep theirs."""

    brightness: Fraction = 0.0  # the factor is drawn between 1 - brightness and 1 + brightness
    contrast: Fraction = 0.0  # factor of the difference from the mean, as for brightness
    gamma: NonNegative = 0.0  # the exponent is drawn between 1 / (1 + gamma) and 1 + gamma
    noise: Fraction = 0.0  # largest standard deviation of Gaussian noise on grey values from 0 to 1


class Augment(Section):
    """Random changes of each training image and its mask, for segmentation.

    A generative model learns the changes as well: it then generates rotated, deformed and noisy images.
    """

    vertical_flip: bool = False
    affine: Affine = Affine()
    elastic: Elastic = Elastic()
    intensity: Intensity = Intensity()


class Train(Section):
    """Training of the model."""

    seed: Seed = 0
    # weights to start from: models:/NAME@ALIAS, models:/NAME/NUMBER, weights:/NAME of `medgen weights fetch`, or a
    # folder (artifacts/model of another project, or of diffusers); with #sha256=HEX at its end only if the weights have
    # that hash. None: random weights
    init_from: Annotated[str, Field(min_length=1)] | None = None
    init_strict: bool = True  # False: take only tensors whose name and shape fit, and name the others in the log
    freeze: Literal["encoder"] | None = None  # part that keeps the weights of init_from
    batch_size: Count = 32  # over all processes
    # parts of a batch that a process trains on in turn, to save memory (gradient accumulation). BatchNorm, codebooks,
    # sigma, dice and free bits then see one part at a time
    accumulate_steps: Count = 1
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)] = (Phase(name="train", epochs=1),)
    clip_norm: Positive = 1.0
    ema_decay: Fraction = 0.0  # of averaged weights; 0: none
    horizontal_flip: bool = False  # off by default, since it mirrors the heart
    augment: Augment = Augment()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    keep: Literal["last", "best"] = "last"  # exported weights; best: of the epoch with the lowest val/objective
    on_nonfinite: Literal["raise", "rollback"] = "raise"
    max_rollbacks: Count = 3
    sample_every: Count = 10  # epochs between grids of samples and reconstructions
    checkpoint_seconds: NonNegative = 60.0  # between checkpoints; one is also saved after each epoch
    subset: Count | None = None  # number of training images, spread over the split; None: all
    # sides of random crops to train on, such as [64, 64, 64]; models with a latent grid and unet. Whole images are then
    # encoded and decoded by overlapping windows of this size. None: whole images
    patch: tuple[Width, ...] | None = None

    @field_validator("phases", mode="before")
    @classmethod
    def _name_phases(cls, phases: Any) -> Any:
        """Read a mapping from a phase's name to its keys."""
        if not isinstance(phases, Mapping):
            return phases
        return [
            {**(keys or {}), "name": name} if isinstance(keys, Mapping | None) else keys
            for name, keys in phases.items()
        ]

    @field_serializer("phases")
    def _map_phases(self, phases: tuple[Phase, ...], info: SerializationInfo) -> dict[str, Any]:
        return {phase.name: phase.model_dump(mode=info.mode, exclude={"name"}) for phase in phases}

    @model_serializer(mode="wrap")
    def _without_new_keys(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, dump(self), "augment", "patch")

    @model_validator(mode="after")
    def _phase_names_differ(self) -> Self:
        names = [phase.name for phase in self.phases]
        if len(set(names)) != len(names):
            raise ValueError(f"phase names must differ, found {names}")
        if not any(phase.epochs for phase in self.phases) and not self.init_from:
            raise ValueError(
                "phases have no epochs; expected at least one, or init_from to use its weights as they are"
            )
        return self

    @model_validator(mode="after")
    def _frozen_weights_are_not_random(self) -> Self:
        if self.freeze and not self.init_from:
            raise ValueError(f"freeze: {self.freeze} would keep random weights; set init_from too")
        return self
