"""Sections `data` and `preprocess`."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from medgen.config.base import Count, Fraction, NonNegative, Positive, Section, Seed, without_defaults

Side = Annotated[int, Field(ge=16, le=1024, multiple_of=4)]
ConditionName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]{0,63}$")]
GreyLevel = Annotated[int, Field(ge=0, le=65535)]
Percentile = Annotated[float, Field(ge=0.0, le=100.0)]


class Data(Section):
    """The raw images."""

    path: str = "data"  # folder tracked by data.dvc, relative to the project's folder
    name: str = "dataset"  # the dataset's name, set by `medgen data import`
    patient_pattern: str | None = None  # regular expression for file names; group 1 is the patient
    keep_patient_ids: bool = False  # False: the store holds salted hashes of them
    splits: Literal["given", "own"] = "given"  # use the dataset's own train/val/test splits, or make new ones
    duplicates: Literal["keep", "drop", "error"] = "keep"  # files with identical bytes; a new split keeps them together
    # patients, duplicates and near-duplicates in two splits; move: to the split that has most of their images
    leaks: Literal["warn", "error", "move"] = "warn"


MAX_VOXELS = 1 << 27  # of a stored volume: 512 x 512 x 512


class Volume(Section):
    """Slices of a volume (NIfTI, MGZ, Analyze), in RAS orientation; with three sides their stack is one item."""

    axis: Literal["axial", "coronal", "sagittal"] = "axial"
    first: Fraction = 0.0  # first slice, as a fraction of the axis
    last: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # last slice
    step: Count = 1  # keep every n-th slice
    frame: Annotated[int, Field(ge=0)] = 0  # frame of a 4-D series
    min_foreground: Fraction = 0.05  # skip slices with a smaller fraction of tissue; whole volumes are never skipped
    window: tuple[Percentile, Percentile] = (0.5, 99.5)  # percentiles of the volume mapped to black and white

    @model_validator(mode="after")
    def _ranges_are_not_empty(self) -> Self:
        if self.first >= self.last:
            raise ValueError(f"first must lie below last, found {self.first} and {self.last}")
        if self.window[0] >= self.window[1]:
            raise ValueError(f"window must rise, found {self.window}")
        return self


PERCENTILE = "percentile"


class IntensityWindow(Section):
    """Intensities that become black and white; what lies outside is clipped."""

    low: Annotated[float, Field(allow_inf_nan=False)]  # black, in the files' own unit, such as -1000
    high: Annotated[float, Field(allow_inf_nan=False)]  # white
    # name of the files' unit for records and outputs, such as HU; percentile: low and high are percentiles of each
    # image or volume
    unit: Annotated[str, Field(pattern=r"^[A-Za-z0-9/%^*._ -]{0,16}$")] = ""

    @property
    def is_percentile(self) -> bool:
        """True if `low` and `high` are percentiles, so that images have no common scale."""
        return self.unit == PERCENTILE

    @model_validator(mode="after")
    def _window_is_not_empty(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low must lie below high, found {self.low:g} and {self.high:g}")
        if self.is_percentile and not 0 <= self.low < self.high <= 100:
            raise ValueError(f"percentiles lie between 0 and 100, found {self.low:g} and {self.high:g}")
        return self


class Condition(Section):
    """A property of images, besides their class, that generation can be conditioned on."""

    # category: one of several values; multilabel: any number of findings, such as a+b or a|b; number: from low to high;
    # mask: the mask of the image; image: a paired image, such as another contrast
    kind: Literal["category", "multilabel", "number", "mask", "image"]
    low: Annotated[float, Field(allow_inf_nan=False)] | None = None  # number: smallest value
    high: Annotated[float, Field(allow_inf_nan=False)] | None = None  # number: largest value
    folder: FolderName | None = None  # image: name of the folder beside images/ that has the paired images

    @model_serializer(mode="wrap")
    def _without_new_keys(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the folder where there is none: stores and models of other conditions keep their bytes."""
        return without_defaults(self, dump(self), "folder")

    @model_validator(mode="after")
    def _only_numbers_have_a_range(self) -> Self:
        if self.kind != "number":
            if self.low is not None or self.high is not None:
                raise ValueError(f"low and high are for kind number, found kind {self.kind}; remove them")
        elif self.low is None or self.high is None or self.low >= self.high:
            raise ValueError(f"kind number needs low below high, found {self.low} and {self.high}")
        return self

    @model_validator(mode="after")
    def _only_images_have_a_folder(self) -> Self:
        if (self.kind == "image") != (self.folder is not None):
            raise ValueError(f"kind image needs a folder, and no other kind has one; found {self.kind}, {self.folder}")
        return self


class Preprocess(Section):
    """From image files to the store of uint8 or uint16 images or volumes."""

    # side of square images; [height, width]; or [depth, height, width] of volumes, with slices along volume.axis
    image_size: Side | tuple[Side, Side] | tuple[Side, Side, Side] = 64
    channels: Literal[1, 3] = 1  # greyscale or RGB
    volume: Volume = Volume()
    # mm between voxels along [depth, height, width] of stored volumes, for NIfTI output: it changes no voxel. None: the
    # median of the train files; give it for files without one, such as MedMNIST3D
    voxel_size: tuple[Positive, Positive, Positive] | None = None
    bits: Literal[8, 16] = 8  # of a stored grey value
    # intensities that become black and white; None: the window that a DICOM file names, volume.window for volumes, all
    # values of the type for other files. Intensities can be mapped back only without CLAHE (clahe_clip: 0)
    window: IntensityWindow | None = None
    fit: Literal["pad", "squash"] = "pad"  # keep the aspect ratio with black borders, or stretch
    clahe_clip: NonNegative = 2.0  # contrast limit of CLAHE; 0 disables it
    clahe_tiles: Annotated[int, Field(ge=1, le=256)] = 8  # CLAHE uses tiles x tiles regions
    # grey value of each class in the mask files, class 0 first, such as [0, 85, 170, 255]; None: binary masks
    mask_values: Annotated[tuple[GreyLevel, ...], Field(min_length=2, max_length=256)] | None = None
    # properties besides the class that a prior with a network, the refiner and a cvae are conditioned on, by the column
    # of manifest.csv that has them, such as {sex: {kind: category}, age: {kind: number, low: 0, high: 100}}; a
    # condition of kind mask is the image's mask, one of kind image a file in its folder (docs/conditions.md)
    conditions: dict[ConditionName, Condition] = Field(default_factory=dict)
    reduced_decode: bool = False  # decode JPEGs at 1/2, 1/4 or 1/8 if the output is that much smaller
    val_fraction: Fraction = 0.1
    test_fraction: Fraction = 0.2  # if the dataset has no split of its own
    max_rejected: Annotated[float, Field(ge=0.0, le=1.0)] = 0.05  # stop if a larger fraction of images is unreadable
    seed: Seed = 0
    # Dask cluster that reads the images, such as tcp://10.0.0.5:8786; None: threads of this machine. It does not change
    # the result, and is in no hash and no file
    scheduler: Annotated[str, Field(pattern=r"^(tcp|tls)://\S+:\d+$")] | None = Field(default=None, exclude=True)

    @property
    def mask_classes(self) -> int:
        """Number of classes in a mask, 2 for binary masks."""
        return 2 if self.mask_values is None else len(self.mask_values)

    @property
    def paired_folders(self) -> dict[str, str]:
        """Folder of each condition of kind image, by its name."""
        return {name: condition.folder for name, condition in self.conditions.items() if condition.folder is not None}

    @property
    def sides(self) -> tuple[int, ...]:
        """Height and width of the images, or depth, height and width of volumes."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def has_volumes(self) -> bool:
        """True if the items are volumes."""
        return len(self.sides) == 3

    @property
    def scale(self) -> IntensityWindow | None:
        """The window whose intensities all images share; None for percentiles, and with CLAHE, which changes them."""
        return None if self.window is None or self.window.is_percentile or self.clahe_clip > 0 else self.window

    @property
    def intensities(self) -> str:
        """Depth and scale of the images for people, such as "16 bits, black -1000 HU, white 400 HU"."""
        if self.scale is not None:
            low, high = (f"{value:g} {self.scale.unit}".rstrip() for value in (self.scale.low, self.scale.high))
            return f"{self.bits} bits, black {low}, white {high}"
        return f"{self.bits} bits, without a common unit"

    @model_serializer(mode="wrap")
    def _without_new_keys(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out keys of later versions at their defaults: stores and models of others keep their bytes."""
        return {key: value for key, value in dump(self).items() if (key, value) not in _NEW_KEYS.items()}

    @model_validator(mode="after")
    def _conditions_have_columns(self) -> Self:
        images = set(self.paired_folders)
        reserved = {name for name, condition in self.conditions.items() if (condition.kind, name) != ("mask", "mask")}
        if reserved := reserved & RESERVED_COLUMNS | images & ATTRIBUTE_COLUMNS:
            raise ValueError(f"conditions: {min(reserved)} is a column with another meaning; rename the condition")
        masks = [name for name, condition in self.conditions.items() if condition.kind == "mask"]
        if len(masks) > 1:
            raise ValueError(f"conditions: found {len(masks)} of kind mask ({', '.join(masks)}), expected at most one")
        if len({folder.lower() for folder in self.paired_folders.values()}) < len(images):
            raise ValueError(f"conditions: {', '.join(sorted(images))} need different folders")
        return self

    @model_validator(mode="after")
    def _clahe_leaves_no_unit(self) -> Self:
        if self.window and self.window.unit and not self.window.is_percentile and self.clahe_clip > 0:
            raise ValueError(
                f"CLAHE changes intensities, so they would not be in {self.window.unit}; set clahe_clip to 0, or "
                "remove window.unit"
            )
        return self

    @model_validator(mode="after")
    def _volumes_are_grey(self) -> Self:
        if not self.has_volumes:
            if self.voxel_size is not None:
                raise ValueError("voxel_size is of volumes, and image_size has not three sides; remove it")
            return self
        if self.clahe_clip > 0 or self.channels == 3:
            raise ValueError(
                "image_size has three sides, so the items are volumes: set clahe_clip to 0 and channels to 1"
            )
        if math.prod(self.sides) > MAX_VOXELS:
            raise ValueError(f"image_size: found {math.prod(self.sides)} voxels; expected at most {MAX_VOXELS}")
        return self

    @model_validator(mode="after")
    def _mask_values_differ(self) -> Self:
        if self.mask_values is not None and len(set(self.mask_values)) != len(self.mask_values):
            raise ValueError(f"mask_values must differ, found {list(self.mask_values)}")
        return self


_NEW_KEYS: dict[str, Any] = {"bits": 8, "window": None, "conditions": {}, "voxel_size": None}  # their defaults
# of manifest.csv, the user's or a store's
RESERVED_COLUMNS = frozenset(
    ("path", "label", "patient", "group", "split", "index", "sha256", "width", "height", "mode", "mask")
)
ATTRIBUTE_COLUMNS = frozenset(("sex", "age", "view"))  # of a patient or image, which a file name cannot replace
