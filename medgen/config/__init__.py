"""params.yaml -> frozen sections, one per stage; `load` is the only door.

params = load(Path("params.yaml"), ["train.batch_size=16"])
"""

import difflib
import hashlib
import io
import json
import warnings
from collections.abc import Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from medgen.errors import UserError

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Grey = Annotated[int, Field(ge=0, le=65535)]
Percentile = Annotated[float, Field(ge=0.0, le=100.0)]


class Section(BaseModel):
    """A part of params.yaml: unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Data(Section):
    """Where the raw images are and what is known of them."""

    path: str = "data"  # folder tracked by data.dvc, relative to the folder medgen runs in
    name: str = "phantom-chest"  # the dataset's name in MLflow
    patient_pattern: str | None = None  # regular expression on the file name; group 1 is the patient
    keep_patient_ids: bool = False  # False: the store holds salted hashes of them
    splits: Literal["given", "own"] = "given"  # keep the data's own train/val/test, or cut all anew
    duplicates: Literal["keep", "drop", "error"] = "keep"  # files of identical bytes; a split we cut never parts them
    # patients, duplicates and near-duplicates on two sides of a split; move: each whole to the side that has most of it
    leaks: Literal["warn", "error", "move"] = "warn"


class Volume(Section):
    """How a volume (NIfTI, MGZ, Analyze) is cut into slices, after it is turned to RAS axes."""

    axis: Literal["axial", "coronal", "sagittal"] = "axial"
    first: Fraction = 0.0  # slices from this share of the axis ...
    last: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # ... to this one
    step: Count = 1  # every how manyth slice
    frame: Annotated[int, Field(ge=0)] = 0  # of a series (4-D)
    min_foreground: Fraction = 0.05  # slices with a smaller share of tissue are left out
    window: tuple[Percentile, Percentile] = (0.5, 99.5)  # percentiles of the volume that become black and white

    @model_validator(mode="after")
    def _ranges_are_not_empty(self) -> Self:
        if self.first >= self.last:
            raise ValueError(f"first must lie below last, found {self.first} and {self.last}")
        if self.window[0] >= self.window[1]:
            raise ValueError(f"window must rise, found {self.window}")
        return self


class Preprocess(Section):
    """image file -> uint8 store."""

    image_size: Annotated[int, Field(ge=16, le=1024, multiple_of=4)] = 64
    channels: Literal[1, 3] = 1  # grey, or colour kept
    volume: Volume = Volume()
    fit: Literal["pad", "squash"] = "pad"  # keep the aspect with black borders, or stretch
    clahe_clip: NonNegative = 2.0  # contrast limit of CLAHE; 0 leaves it out
    clahe_tiles: Count = 8  # CLAHE works on tiles x tiles regions
    # grey value of each class in the mask files, class 0 first, such as [0, 85, 170, 255]; None: masks are on or off
    mask_values: Annotated[tuple[Grey, ...], Field(min_length=2, max_length=256)] | None = None
    reduced_decode: bool = False  # decode JPEGs at 1/2, 1/4, 1/8 where the output is that much smaller
    val_fraction: Fraction = 0.1
    test_fraction: Fraction = 0.2  # only where the data brings no split of its own
    max_rejected: Annotated[float, Field(ge=0.0, le=1.0)] = 0.05  # a larger share of unreadable images stops the run
    seed: int = 0

    @property
    def mask_classes(self) -> int:
        return 2 if self.mask_values is None else len(self.mask_values)

    @model_validator(mode="after")
    def _mask_values_differ(self) -> Self:
        if self.mask_values is not None and len(set(self.mask_values)) != len(self.mask_values):
            raise ValueError(f"mask_values must differ, found {list(self.mask_values)}")
        return self


class Features(Section):
    """The domain extractor: a small classifier trained on the train split."""

    width: Count = 16  # channels after the first convolution
    epochs: Count = 10
    batch_size: Count = 16
    learning_rate: Positive = 3e-3
    seed: int = 0


class Model(Section):
    """Which network, and its sizes. Image size and classes come from the store."""

    name: str = "spatial_vae"
    base_channels: Count = 32  # channels after the first convolution; doubled at each stage
    max_channels: Count = 512
    blocks_per_stage: Count = 1
    latent_size: Count | None = None  # side of the latent grid; the number of stages follows. None: by image size
    latent_channels: Count | None = None  # None: the whole latent has a quarter as many numbers as the image pixels
    attention_resolutions: tuple[int, ...] = (16,)  # grid sides with self-attention, where they occur
    logvar_bound: Positive = 10.0  # log-variance is bound * tanh(x / bound)
    num_codes: Count = 512  # vqvae: vectors in the codebook
    codebook: Literal["ema", "gradient", "cosine"] = "ema"  # vqvae: how codes move; cosine: nearest by angle
    label_channels: Count = 32  # cvae: numbers that stand for the label
    down: Literal["maxpool", "strided"] = "maxpool"  # autoencoder, unet
    up: Literal["transposed", "upsample"] = "transposed"  # autoencoder, unet


class Beta(Section):
    """Weight of the KL term over a phase."""

    schedule: Literal["constant", "linear", "cyclical"] = "constant"
    start: NonNegative = 0.0  # linear, cyclical: value at the beginning
    end: NonNegative = 0.0  # the value itself for constant
    epochs: Count = 1  # linear: length of the ramp; cyclical: length of one cycle


class Schedule(Section):
    """Learning rate over a phase, as a factor of the phase's rate."""

    name: Literal["constant", "cosine_restarts", "plateau"] = "constant"
    period: Count = 10  # cosine_restarts: epochs to the first restart
    period_factor: Count = 1  # cosine_restarts: each period is this many times the last
    min_factor: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5  # plateau: what the rate is multiplied by
    patience: Count = 5  # plateau: epochs without a lower val/objective


class Weights(Section):
    """Weights of the image terms; each term is a mean over pixels."""

    l1: NonNegative = 0.0
    mse: NonNegative = 0.0
    bce: NonNegative = 0.0
    ssim: NonNegative = 0.0  # of 1 - SSIM
    perceptual: NonNegative = 0.0  # VGG16 features; needs `medgen weights fetch vgg16`
    sigma: NonNegative = 0.0  # Gaussian likelihood with the best variance: nothing is left to tune (β = 1)
    dice: NonNegative = 0.0  # of 1 - Dice, for masks

    @model_validator(mode="after")
    def _something_is_learnt(self) -> Self:
        if not any(self.model_dump().values()):
            raise ValueError("no term has a weight; expected one above 0, such as {l1: 1.0}")
        return self


class Loss(Section):
    """The objective. β itself belongs to a phase."""

    weights: Weights = Weights(l1=1.0, ssim=0.5)
    # elbo: β·KL/(C·H·W), so that β = 1 is the evidence lower bound; sum: β·KL; mean: β·KL/D
    kl_reduction: Literal["elbo", "sum", "mean"] = "elbo"
    free_bits: NonNegative = 0.0  # nats per latent channel that cost nothing
    commitment: NonNegative = 0.25  # vqvae: keeps the encoder's vectors near their codes


class Phase(Section):
    """A stretch of training. The loop never asks which phase it is in."""

    name: str
    epochs: Annotated[int, Field(ge=0)]
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: Positive = 1e-4
    weight_decay: NonNegative = 1e-5
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Schedule = Schedule()
    beta: Beta = Beta()
    weights: Weights | None = None  # in place of loss.weights during this phase


class Train(Section):
    """How the model is trained."""

    seed: int = 0
    batch_size: Count = 32  # over all processes
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)] = (Phase(name="train", epochs=1),)
    clip_norm: Positive = 1.0
    ema_decay: Fraction = 0.0  # 0: no averaged weights
    horizontal_flip: bool = False  # mirrors the heart: a choice, not a default
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    keep: Literal["last", "best"] = "last"  # weights to export; best: of the epoch with the lowest val/objective
    on_nonfinite: Literal["raise", "rollback"] = "raise"
    max_rollbacks: Count = 3
    sample_every: Count = 10  # epochs between sample and reconstruction grids
    checkpoint_seconds: NonNegative = 60.0  # also saved at every epoch's end
    subset: Count | None = None  # only this many training images, spread over the split

    @model_validator(mode="after")
    def _phase_names_differ(self) -> Self:
        names = [phase.name for phase in self.phases]
        if len(set(names)) != len(names):
            raise ValueError(f"phase names must differ, found {names}")
        if not any(phase.epochs for phase in self.phases):
            raise ValueError("phases have no epoch in all; at least one is needed")
        return self


class Prior(Section):
    """What latents are drawn from when the model generates."""

    name: str | None = None  # None: tokens for models with a codebook, gmm for the others
    conditional: bool = True  # told apart by class where the data has labels
    seed: int = 0
    components: tuple[Count, ...] = (1, 2, 4, 8)  # gmm: tried; the best held-out likelihood is kept
    variance_kept: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95  # gmm: share of latent variance under the mixture
    # flow and tokens are networks, trained on the latents; an epoch of theirs is 100 steps
    channels: Annotated[int, Field(ge=8, multiple_of=8)] = 64  # width of the network
    blocks: Count = 4  # residual blocks (flow), transformer blocks (tokens)
    epochs: Count = 20
    batch_size: Count = 64
    learning_rate: Positive = 1e-3
    dropout: Fraction = 0.1
    sampling_steps: Annotated[int, Field(ge=1, le=1000)] | None = None  # None: 25 (flow), 10 (tokens)
    solver: Literal["euler", "midpoint"] = "midpoint"  # flow: midpoint asks the network twice a step
    guidance: NonNegative = 1.0  # strength of the label (Ho & Salimans 2022); 1 is plain, 0 forgets it


class Refiner(Section):
    """The flow on pixels that draws the detail which the decoder leaves out."""

    enabled: bool = False
    seed: int = 0
    conditional: bool = True  # on the class, where the data has labels
    channels: Annotated[int, Field(ge=8, multiple_of=8)] = 32  # width of the network
    blocks: Count = 4  # residual blocks: half on the smallest grid, a quarter on each larger one, down and up
    dropout: Fraction = 0.0
    # noise on the latents in training, at most, in their standard deviations; the refiner draws what it hides, so that
    # it also repairs the prior's faults
    latent_noise: NonNegative = 1.0
    epochs: Count = 20
    batch_size: Count = 8  # over all processes
    learning_rate: Positive = 2e-3
    ema_decay: Fraction = 0.999
    horizontal_flip: bool = False  # mirrors the heart: a choice, not a default
    # how it draws; changed without training again
    sampling_steps: Annotated[int, Field(ge=1, le=1000)] = 4
    solver: Literal["euler", "midpoint"] = "midpoint"  # midpoint evaluates the network twice a step
    sampling_noise: NonNegative = 0.5  # noise on a sample's latent, at most `latent_noise`
    guidance: NonNegative = 1.0  # strength of the label (Ho & Salimans 2022); 1 is plain, 0 ignores it

    @model_validator(mode="after")
    def _draws_within_what_it_learnt(self) -> Self:
        if self.sampling_noise > self.latent_noise:
            raise ValueError(
                f"sampling_noise: found {self.sampling_noise:g}, expected at most latent_noise, {self.latent_noise:g}"
            )
        return self


class LocalNetwork(Section):
    """A feature network from a local file: safetensors of a torchvision architecture, or TorchScript (docs/data.md)."""

    path: str  # relative to the folder medgen runs in
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    architecture: Literal["resnet18", "resnet34", "resnet50", "densenet121", "torchscript"]
    image_size: Count = 224  # images are resized to this side
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of the network's training images in [0, 1]
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)


class Evaluate(Section):
    """How the model is evaluated, on the test split."""

    num_generated: Count = 2000  # samples are free, and comparisons of models need many
    batch_size: Count = 64
    seed: int = 0
    grid_images: Count = 36
    # feature networks; inception adds IS, FID and KID (`medgen weights fetch inception`), local FID and KID
    extractors: tuple[Literal["domain", "inception", "local"], ...] = ("domain",)
    local: LocalNetwork | None = None
    save_images: bool = False  # what is compared, as PNG files: reports/images/generated and reports/images/real

    @model_validator(mode="after")
    def _extractors_are_complete(self) -> Self:
        if "domain" not in self.extractors:
            raise ValueError(f"extractors must hold domain, found {list(self.extractors)}")
        if "local" in self.extractors and self.local is None:
            raise ValueError(
                "extractors hold local, but there is no section evaluate.local: {path, sha256, architecture}"
            )
        return self


class Searched(Section):
    """The values of one parameter that a search may take: from `low` to `high`, both included, or one of `choices`."""

    low: Annotated[float, Field(allow_inf_nan=False)] | None = None
    high: Annotated[float, Field(allow_inf_nan=False)] | None = None
    log: bool = False  # even in the logarithm
    step: Positive | None = None
    choices: Annotated[tuple[str | int | float | bool, ...], Field(min_length=2)] | None = None

    @model_validator(mode="after")
    def _is_a_range_or_choices(self) -> Self:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.step is not None:
                raise ValueError("expected choices, or low and high, found both")
            if len(set(self.choices)) < len(self.choices):
                raise ValueError(f"choices must differ, found {list(self.choices)}")
            return self
        if self.low is None or self.high is None:
            raise ValueError("expected low and high, or choices")
        if self.low >= self.high:
            raise ValueError(f"the range is empty: low must lie below high, found {self.low:g} and {self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs a low above 0 and no step")
        if self.step is not None and self.step > self.high - self.low:
            raise ValueError(f"step {self.step:g} is longer than the range")
        return self


class TrialBudget(Section):
    """Limits that make a trial cheaper than a full training."""

    epochs: Count | None = None  # of all phases in sum; their shares stay, ramps and schedules shrink with them
    subset: Count | None = None  # only this many training images, spread over the split
    num_generated: Annotated[int, Field(ge=3)] = 2000  # below 2000 samples the ranking is rough


class Tune(Section):
    """The search for better parameters; every trial is evaluated on the val split."""

    space: dict[str, Searched] = {}  # dotted key of model, loss, train, prior -> its values; empty: see tune/space.py
    # a key of docs/contract.md, or pareto: 1 - MS-SSIM (1 - SSIM of small images) against MMD. None:
    # generation/mmd_domain; segmentation/dice_foreground of models that find masks
    objective: str | None = None
    ssim_floor: Fraction | None = None  # a winner's reconstruction/ssim at least; None: what params.yaml itself reaches
    pruner: Literal["median", "hyperband", "none"] = "median"  # by val/ssim (val/dice) after each epoch
    storage: str = "optuna.journal"  # a file, relative to the project's folder, or postgresql://…
    seed: int = 0
    trial: TrialBudget = TrialBudget()


class Tracking(Section):
    """Where runs are recorded."""

    uri: str = "sqlite:///mlflow.db"  # relative sqlite paths are in the project's folder
    experiment: str = "medgen"
    enabled: bool = True
    system_metrics: bool = True
    timeout_seconds: Positive = 5.0  # for one call to a tracking server


class Gates(Section):
    """What a version must show to become champion; docs/registry.md says why. Masks are compared by Dice alone."""

    ssim_floor: Fraction = 0.6  # reconstruction/ssim at least
    ssim_margin: NonNegative = 0.01  # and on the same images at most this below a champion's
    alpha: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05  # a candidate worse than a champion with p below is refused
    copy_rate_ceiling: Annotated[float, Field(ge=0.0, le=1.0)] | None = (
        None  # privacy/copy_rate at most; None: privacy/copy_rate_plausible
    )
    dice_floor: Fraction = 0.6  # segmentation/dice_foreground at least
    dice_margin: NonNegative = 0.01  # and on the same images at most this below a champion's

    @model_validator(mode="before")
    @classmethod
    def _takes_an_older_file(cls, values: Any) -> Any:
        if isinstance(values, dict) and "kid_margin" in values:
            warnings.warn("registry.gates.kid_margin: no longer used; the gates are paired tests now", stacklevel=2)
            return {key: value for key, value in values.items() if key != "kid_margin"}
        return values


class Registry(Section):
    """How a model becomes a registered version, and a version the champion."""

    model_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]*$")] = "medgen"
    register_after_evaluate: bool = True
    gates: Gates = Gates()


class Params(Section):
    """All of params.yaml."""

    data: Data = Data()
    preprocess: Preprocess = Preprocess()
    features: Features = Features()
    model: Model = Model()
    loss: Loss = Loss()
    train: Train = Train()
    prior: Prior = Prior()
    refiner: Refiner = Refiner()
    evaluate: Evaluate = Evaluate()
    tune: Tune = Tune()
    tracking: Tracking = Tracking()
    registry: Registry = Registry()


@dataclass(frozen=True)
class Project:
    """The folder a command runs in, and where everything stands in it."""

    root: Path
    apart: Path | None = None  # where model, prior, runs and reports stand instead: of a search's trial, of a version

    @property
    def dataset(self) -> Path:
        return self.root / "artifacts" / "dataset"

    @property
    def features(self) -> Path:
        return self.root / "artifacts" / "features"

    @property
    def model(self) -> Path:
        return self._own / "artifacts" / "model"

    @property
    def prior(self) -> Path:
        return self._own / "artifacts" / "prior"

    @property
    def refiner(self) -> Path:
        return self._own / "artifacts" / "refiner"

    @property
    def evaluation(self) -> Path:
        return self._own / "artifacts" / "evaluation"

    @property
    def runs(self) -> Path:
        return self._own / "runs"

    @property
    def reports(self) -> Path:
        return self._own / "reports"

    @property
    def figures(self) -> Path:
        return self._own / "reports" / "figures"

    @property
    def images(self) -> Path:
        return self._own / "reports" / "images"

    @property
    def _own(self) -> Path:
        return self.apart or self.root


def load(path: Path, overrides: Sequence[str] = ()) -> Params:
    """Reads and checks a params file; `overrides` are `dotted.key=YAML value`.

    Raises:
        UserError: the file is missing or no YAML, a key is unknown or a value is wrong.
    """
    tree = _read_yaml(path)
    for override in overrides:
        _apply(tree, override)
    return _validate(tree, str(path))


def replace(params: Params, values: Mapping[str, Any], source: str) -> Params:
    """The parameters with other values at dotted keys, such as train.phases.0.epochs.

    Args:
        params: what the others are taken from.
        values: dotted key to value.
        source: where the values come from, for messages.

    Raises:
        UserError: a key is unknown or a value is wrong.
    """
    tree = params.model_dump(mode="json")
    for key, value in values.items():
        set_at(tree, key, value, f"{source}.{key}")
    return _validate(tree, source)


def fingerprint(*parts: object) -> str:
    """Twelve hexadecimal digits of the SHA-256 of JSON-serialisable parts or sections."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def seed_of(*parts: int) -> int:
    """A 63-bit seed from integers such as (seed, step, rank): unrelated even where those are neighbours."""
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def unknown_name(kind: str, name: str, known: Mapping[str, object] | Sequence[str]) -> UserError:
    """The error for a name that is not in a registry: lists the choices and the nearest one."""
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return UserError(f"{kind}: unknown name {name!r}{hint} Known: {', '.join(sorted(known))}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: not found. Run medgen in the folder that holds the params file, or name one with --params FILE"
        ) from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as 'train:', found {type(tree).__name__}")
    return tree


def _validate(tree: Mapping[str, Any], source: str) -> Params:
    try:
        return Params.model_validate(tree)
    except ValidationError as error:
        found = error.errors()
        # what is wrong within a list says it all, and not that the list is wrong too
        inner = [item for item in found if not any(_lies_within(other["loc"], item["loc"]) for other in found)]
        raise UserError(f"{source}: " + "\n".join(map(_explain, inner))) from None


def _lies_within(place: Sequence[str | int], outer: Sequence[str | int]) -> bool:
    return len(place) > len(outer) and tuple(place[: len(outer)]) == tuple(outer)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise UserError(f"--set {override}: expected key=value with a dotted key, such as train.batch_size=16")
    try:
        value = YAML(typ="safe", pure=True).load(io.StringIO(text))
    except YAMLError as error:
        raise UserError(f"--set {override}: the value is not YAML: {error}") from None
    set_at(tree, key.strip(), value, f"--set {override}")


def set_at(tree: Any, key: str, value: Any, source: str) -> None:
    """Puts a value at a dotted key of nested mappings and lists; mappings that are missing are made.

    Raises:
        UserError: the key leads through a value, or past the end of a list; `source` opens the message.
    """
    node, parts = tree, key.split(".")
    for position, part in enumerate(parts):
        if isinstance(node, MutableSequence):
            if not part.isdigit() or part != str(int(part)) or int(part) >= len(node):
                raise UserError(f"{source}: {part!r} is no index into a list of {len(node)}")
            part = int(part)  # type: ignore[assignment]  # an index from here on
        elif not isinstance(node, MutableMapping):
            raise UserError(f"{source}: {'.'.join(parts[:position])} holds a value, not a section")
        elif part not in node or node[part] is None:
            node[part] = {}
        if position == len(parts) - 1:
            node[part] = value
        else:
            node = node[part]


def _explain(error: Any) -> str:
    """One line for one of pydantic's findings, with the nearest known key for an unknown one."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{key}: {error['msg']} (found {error['input']!r})"
    siblings = _fields_at(error["loc"][:-1])
    near = difflib.get_close_matches(str(error["loc"][-1]), siblings, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{key}: unknown key; {hint}Known here: {', '.join(siblings)}"


def _fields_at(location: Sequence[str | int]) -> list[str]:
    section: Any = Params
    for part in location:
        if isinstance(part, int) or part not in section.model_fields:
            continue  # a position in a list, or a key of tune.space
        annotation = section.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next(o for o in options if isinstance(o, type) and issubclass(o, Section))
    return list(section.model_fields)
