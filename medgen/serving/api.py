"""Python API of a trained model, for notebooks: `medgen.load` and `medgen.open_dataset`.

model = medgen.load()
images = model.sample(16, label="NORMAL", seed=0)
latents = model.encode(images)

Shapes: N images, C channels (1 grey, 3 colour), H W height and width.
"""

import os
import reprlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgen import config
from medgen.config import IntensityWindow, Project, Tracking, seed_of
from medgen.data.arrays import check_images
from medgen.data.conditions import ConditionField
from medgen.data.images import to_floats, to_stored
from medgen.data.s3 import is_s3
from medgen.data.store import Store, open_store
from medgen.datasets.stores import fetch_store
from medgen.errors import UserError
from medgen.inference.anomaly import SCORES, find_anomalies
from medgen.inference.counterfactual import change_label, check_counterfactual
from medgen.inference.inpainting import inpaint
from medgen.inference.uncertainty import reconstruction_deviation
from medgen.ingest.formats.raw import UnreadableImage
from medgen.models.bundle import class_index, label_to_encode
from medgen.priors import find_conditions, find_label, sample_images
from medgen.priors.generator import Generator, load_generator
from medgen.registry import find_model
from medgen.serving.generate import BATCH_SIZE, MAX_STEPS, decode_batches, interpolate_images, load_image, load_map
from medgen.training.distributed import pick_device

Label = str | int  # class name or index
Labels = Label | Sequence[Label] | NDArray[np.integer[Any]]  # of all images, or one for each
MAX_SEED = 2**63 - 1


class Model:
    """A trained model with its prior and, if there is one, its refiner.

    Images are arrays (N, C, H, W) as in a dataset: `dataset.split("test").images[:8]` is a valid argument. Methods take
    uint8 from 0 to 255, uint16 from 0 to 65535 or floats from 0 to 1, and return images as the dataset stores them:
    uint8, or uint16 with `preprocess.bits` 16. Grey images may leave out C, and a single image N. An image must have
    the model's size and preprocessing: `read` gives that of a file.

    Labels are class names or indices, one for all images or one for each.
    """

    def __init__(self, generator: Generator) -> None:
        self._network, self._info = generator.model, generator.info
        self._prior, self._refiner = generator.prior, generator.refiner
        self._device = next(generator.model.parameters()).device

    def __repr__(self) -> str:
        return (
            f"Model({self._info.model.name!r}, image_shape={self.image_shape}, latent_shape={self.latent_shape}, "
            f"classes={self.classes}, prior={self._prior.name!r}, refiner={self._refiner is not None}, "
            f"dataset={self._info.dataset!r}, device={str(self._device)!r})"
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; label i is classes[i]. Empty if the model was trained on images without labels."""
        return self._info.classes

    @property
    def image_shape(self) -> tuple[int, ...]:
        """C, H, W of an image, or C, D, H, W of a volume."""
        return self._info.image_shape

    @property
    def scale(self) -> IntensityWindow | None:
        """Intensities of black (`low`) and white (`high`) and their `unit`; None if the images have no common scale."""
        return self._info.preprocess.scale

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of the latent of an image."""
        return tuple(self._network.latent_shape)

    def read(self, path: str | Path) -> NDArray[Any]:
        """The image of a file, preprocessed as the train images were: (1, C, H, W).

        All formats of docs/data.md are read; a volume or series gives its middle slice. A model of volumes gets the
        whole volume (1, C, D, H, W), of a file or of a folder with the slices of a DICOM series.

        Raises:
            UserError: the file is not a readable image.
        """
        try:
            return self._stored(load_image(Path(path), self._info.preprocess))
        except UnreadableImage as error:
            raise UserError(f"{path}: not readable as an image: {error}") from None

    @property
    def conditions(self) -> dict[str, str]:
        """Each condition besides the class and the values that it takes; empty if there are none."""
        space = self._info.space
        return {} if space is None else {field.name: field.describe() for field in space.fields}

    def sample(
        self,
        n: int = 1,
        label: Labels | None = None,
        seed: int | None = None,
        refine: bool = True,
        condition: str | Mapping[str, Any] | None = None,
    ) -> NDArray[Any]:
        """`n` new images (n, C, H, W).

        Args:
            n: number of images.
            label: class of the images. None: drawn with the classes' frequencies in the train split.
            seed: the same seed gives the same images, those of `medgen generate --seed`. None: others at each call.
            refine: use the refiner, if there is one, to add detail that the decoder omits.
            condition: further conditions of all images, such as "view=AP,sex=F" or {"age": 63, "findings":
                ["effusion", "atelectasis"]}; those left out are unknown. A mask is a file, or class numbers (H, W);
                an image is a file, or grey values (H, W) from 0 to 255.

        Raises:
            UserError: an argument is out of range, the label or a condition is unknown, or generation does not depend
                on labels or conditions.
        """
        n = _check_integer("n", n, 1)
        seed = secrets.randbelow(2**31) if seed is None else _check_integer("seed", seed, 0)
        labels = _indices(label, n, self._find_label)
        refiner = self._refiner if refine else None
        model = (self._prior, self._network)
        one = find_conditions(condition or {}, self._info.space, *model, self._read_map)
        conditions = None if one is None else one.expand(n)
        images = sample_images(self._prior, self._network, n, labels, seed, BATCH_SIZE, refiner, conditions)
        return self._stored(images)

    def encode(self, images: NDArray[Any], label: Labels | None = None) -> NDArray[np.float32]:
        """Latents of images, float32 (N, *latent_shape): the means of the posterior of a variational model.

        Args:
            images: as described for the class.
            label: class of the images, which models that use labels in their encoder require and others refuse.

        Raises:
            UserError: the images have another shape, type or range, or the label is missing, unknown or refused.
        """
        return self._encode(*self._inputs(images, label)).cpu().numpy()

    def decode(self, latents: NDArray[Any], label: Labels | None = None) -> NDArray[Any]:
        """Images of latents (N, *latent_shape), or of a single one: (N, C, H, W). The refiner is not used.

        Raises:
            UserError: the latents have another shape or are not finite, or the label is missing, unknown or refused.
        """
        array = np.asarray(latents)
        array = array[None] if array.shape == self.latent_shape else array
        expected = f"(N, {', '.join(map(str, self.latent_shape))})"
        if array.dtype.kind != "f" or array.shape[1:] != self.latent_shape or not len(array):
            raise UserError(f"latents: found {array.dtype} {np.shape(latents)}; expected floats {expected}")
        if not np.isfinite(array).all():
            raise UserError("latents: hold values that are not finite (NaN or infinity)")
        labels = self._labels_to_encode(label, len(array))
        return self._decode(torch.tensor(array, dtype=torch.float32, device=self._device), labels)

    def reconstruct(self, images: NDArray[Any], label: Labels | None = None) -> NDArray[Any]:
        """Images encoded and decoded (N, C, H, W); arguments and errors as in `encode`.

        The refiner is not used, because it would add detail that the images do not have.
        """
        pixels, labels = self._inputs(images, label)
        return self._decode(self._encode(pixels, labels), labels)

    def interpolate(
        self, first: NDArray[Any], second: NDArray[Any], n: int = 9, label: Labels | None = None
    ) -> NDArray[Any]:
        """`n` images between the latents of two images, with the reconstructions of both as ends: (n, C, H, W).

        Args:
            first: a single image.
            second: a single image.
            n: number of images with both ends, 2 to 200.
            label: class of both images, or of each: the first half is decoded as the first, the second as the second.

        Raises:
            UserError: as in `encode`, `n` is out of range, or there is more than one image.
        """
        n = _check_integer("n", n, 2, MAX_STEPS)
        ends = [check_images(end, name, self.image_shape) for end, name in ((first, "first"), (second, "second"))]
        for end, name in zip(ends, ("first", "second"), strict=True):
            if len(end) != 1:
                raise UserError(f"{name}: found {len(end)} images; expected one")
        pixels = torch.cat([to_floats(torch.from_numpy(end)) for end in ends])
        images, _ = interpolate_images(self._network, pixels, self._labels_to_encode(label, 2), n)
        return self._stored(images)

    def uncertainty(
        self, images: NDArray[Any], label: Labels | None = None, n: int = 20, seed: int = 0
    ) -> NDArray[np.float32]:
        """Standard deviation of `n` reconstructions drawn from the posterior, float32 (N, C, H, W).

        In grey values from 0 to 1; arguments and errors as in `encode`.

        Raises:
            UserError: also if the encoder gives no variance.
        """
        n, seed = _check_integer("n", n, 2), _check_integer("seed", seed, 0)
        pixels, labels = self._inputs(images, label)
        generator, parts = torch.Generator().manual_seed(seed), []
        for rows in _batches(len(pixels)):
            of = None if labels is None else labels[rows]
            parts.append(reconstruction_deviation(self._network, pixels[rows].to(self._device), of, n, generator))
        return torch.cat(parts).numpy()

    def anomalies(self, images: NDArray[Any], label: Label | None = None, seed: int = 0) -> dict[str, NDArray[Any]]:
        """Scores and maps of how far images are from the train images (docs/uses.md).

        Args:
            images: as described for the class.
            label: class that counts as normal, for a model or prior that uses labels.
            seed: of the random draws that estimate a flow's density.

        Returns:
            `l1`, `ssim` and `nll` (N,), higher for images that are less like the train images; the maps `error`,
            `dissimilarity` and, if the prior has one, `likelihood` (N, H, W), float32.

        Raises:
            UserError: as in `encode`.
        """
        seed = _check_integer("seed", seed, 0)
        pixels = to_floats(torch.from_numpy(check_images(images, "images", self.image_shape)))
        if label is None or self._network.conditional:
            labels = self._labels_to_encode(label, len(pixels))
        else:
            labels = _indices(label, len(pixels), self._find_label)
        found = []
        for rows in _batches(len(pixels)):
            of = None if labels is None else labels[rows].to(self._device)
            generator = torch.Generator().manual_seed(seed_of(seed, rows.start))
            found.append(find_anomalies(self._network, self._prior, pixels[rows].to(self._device), of, generator))
        scores = torch.cat([each.scores for each in found])
        result = {name: column.numpy() for name, column in zip(SCORES, scores.unbind(dim=1), strict=True)}
        maps = {name: [getattr(each, name) for each in found] for name in ("error", "dissimilarity", "likelihood")}
        return result | {name: torch.cat(each)[:, 0].numpy() for name, each in maps.items() if each[0] is not None}

    def counterfactual(self, images: NDArray[Any], label: Labels, to: Labels) -> NDArray[Any]:
        """Images of class `label` decoded as those of class `to` (N, C, H, W); the refiner is not used.

        Raises:
            UserError: neither model nor prior can change a label, or as in `encode`.
        """
        check_counterfactual(self._network, self._prior)
        pixels = to_floats(torch.from_numpy(check_images(images, "images", self.image_shape)))
        own = _indices(label, len(pixels), lambda text: class_index(text, self.classes))
        others = _indices(to, len(pixels), self._find_label)
        assert own is not None and others is not None
        parts = [
            change_label(
                self._network, self._prior, *(each[rows].to(self._device) for each in (pixels, own, others))
            ).cpu()
            for rows in _batches(len(pixels))
        ]
        return self._stored(torch.cat(parts))

    def inpaint(self, image: NDArray[Any], hole: NDArray[Any], label: Label | None = None) -> NDArray[Any]:
        """A single image with the pixels of `hole` (H, W), bool, filled: (1, C, H, W). Other pixels stay the same.

        Raises:
            UserError: the model has a codebook, the hole has another shape, is empty or the whole image, or as in
                `encode`.
        """
        pixels = to_floats(torch.from_numpy(check_images(image, "image", self.image_shape)))
        if len(pixels) != 1:
            raise UserError(f"image: found {len(pixels)} images; expected one")
        mask = np.asarray(hole)
        if mask.dtype != bool or mask.shape != self.image_shape[1:]:
            raise UserError(f"hole: found {mask.dtype} {mask.shape}; expected bool {self.image_shape[1:]}")
        if label is None or self._network.conditional:
            labels = self._labels_to_encode(label, 1)
        else:
            labels = torch.tensor([self._find_label(str(label))], device=self._device)
        covered = torch.from_numpy(mask.copy())[None, None].to(self._device)
        filled = inpaint(self._network, self._prior, pixels.to(self._device), covered, labels)
        return self._stored(filled.cpu())

    def _find_label(self, text: str) -> int:
        """Index of a class that generation depends on."""
        return find_label(text, self.classes, self._prior, self._network)

    def _read_map(self, field: ConditionField, value: Any) -> NDArray[np.uint8]:
        """Class numbers of a mask or grey values of a paired image (1, H, W), from a file or an array."""
        if isinstance(value, str | os.PathLike):
            return load_map(field, Path(value), self._info.preprocess)
        array, shape = np.asarray(value), self.image_shape[1:]
        what, top = ("grey values", 255) if field.kind == "image" else ("class numbers", field.channels - 1)
        if array.shape != shape or array.dtype.kind not in "bui" or not 0 <= array.min() <= array.max() <= top:
            raise UserError(
                f"condition: {field.name}: found {array.dtype} {array.shape}; expected a file, or {what} {shape} from "
                f"0 to {top}"
            )
        return array.astype(np.uint8)[None]

    def _inputs(self, images: NDArray[Any], label: Labels | None) -> tuple[Tensor, Tensor | None]:
        """Checked images (N, C, H, W) in [0, 1] on the CPU, and their labels (N,) for a model that uses them."""
        pixels = to_floats(torch.from_numpy(check_images(images, "images", self.image_shape)))
        return pixels, self._labels_to_encode(label, len(pixels))

    def _labels_to_encode(self, label: Labels | None, n: int) -> Tensor | None:
        if label is None:
            label_to_encode(self._network, self._info, None)  # refuses a missing label
            return None
        labels = _indices(label, n, lambda text: label_to_encode(self._network, self._info, text) or 0)
        return None if labels is None else labels.to(self._device)

    @torch.no_grad()
    def _encode(self, pixels: Tensor, labels: Tensor | None) -> Tensor:
        parts = []
        for rows in _batches(len(pixels)):
            image_labels = None if labels is None else labels[rows]
            parts.append(self._network.encode(pixels[rows].to(self._device), image_labels).mean.float())
        return torch.cat(parts)

    @torch.no_grad()
    def _decode(self, latents: Tensor, labels: Tensor | None) -> NDArray[Any]:
        return self._stored(decode_batches(self._network, latents, labels))

    def _stored(self, images: Tensor) -> NDArray[Any]:
        return to_stored(images, self._info.preprocess.bits).numpy()


def load(
    model: str | Path | None = None,
    *,
    project: str | Path = ".",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Model:
    """Load a trained model with its prior and refiner.

    Args:
        model: a folder with model/, prior/ and refiner/, or a registered version such as "models:/NAME@champion".
            None: the project's model, artifacts/.
        project: the project's folder. Its params.yaml says where the registry is.
        device: "auto" is the GPU if there is one.

    Raises:
        UserError: there is no such model, a part of it is missing or damaged, it predicts masks, or the MLflow store
            does not answer.
    """
    folder = Path(project)
    source = None if model is None else str(model)
    found = find_model(Project(folder), tracking=_tracking(folder, source), source=source)
    return Model(load_generator(found / "model", found / "prior", found / "refiner", pick_device(device)))


def open_dataset(path: str | Path = "artifacts/dataset") -> Store:
    """Open a preprocessed dataset, a folder or its s3:// address, after a check of its files.

    `split("train")`, `"val"` and `"test"` have `images` (N, C, H, W), uint8 or uint16, and `labels` (N,), memory-mapped
    and read-only: `images[:8]` reads eight images. `rows()` gives the manifest:
    `pandas.DataFrame(dataset.split("test").rows())`.

    Raises:
        UserError: the folder is missing, has another schema, or a file in it is missing or damaged; its bucket cannot
            be read.
    """
    return open_store(fetch_store(str(path)) if is_s3(path) else Path(path))


def _tracking(folder: Path, source: str | None) -> Tracking:
    """The section `tracking` of the project's params.yaml, which only a registered version needs."""
    path = folder / "params.yaml"
    if path.exists():
        return config.load(path).tracking
    if source is not None and source.startswith("models:/") and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UserError(
            f"{path}: not found, and {source} needs its tracking.uri; give the project's folder, "
            'medgen.load(…, project="…"), or set MLFLOW_TRACKING_URI'
        )
    return Tracking()


def _indices(label: Labels | None, n: int, find: Callable[[str], int]) -> Tensor | None:
    """Class index (n,) of each image by `find`, which takes a class name or an index as text."""
    if label is None:
        return None
    labels: Sequence[Any] = [label] * n if isinstance(label, str) or np.ndim(label) == 0 else list(label)  # type: ignore[arg-type]
    if len(labels) != n:
        raise UserError(f"label: found {len(labels)}; expected one, or one for each of the {n} images")
    for one in labels:
        if isinstance(one, bool) or not isinstance(one, str | int | np.integer):
            raise UserError(f"label: found {reprlib.repr(one)}; expected a class by name or index")
    return torch.tensor([find(str(one)) for one in labels])


def _check_integer(name: str, value: object, low: int, high: int = MAX_SEED) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        upper = "" if high == MAX_SEED else f" to {high}"
        raise UserError(f"{name}: found {reprlib.repr(value)}; expected a whole number from {low}{upper}")
    return int(value)


def _batches(n: int) -> Iterator[slice]:
    return (slice(start, start + BATCH_SIZE) for start in range(0, n, BATCH_SIZE))
