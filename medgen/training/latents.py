"""Latents of a dataset on disk: encoded once, then read row by row by the stages `prior` and `refiner`.

runs/RUN/latents_FINGERPRINT/   of one model, dataset and code; it replaces that of another in the same run
  train/ val/                   00000.npy, 00001.npy …: latents (n, *latent_shape) float32 of SHARD_SIZE images each, or
                                codes (n, h, w) of a model with a codebook; 00000.variance.npy: sum of the posterior
                                variances (*latent_shape) float64 over the images of the shard

A shard is complete once its file exists, so a killed encoding continues at the first missing shard.

Shapes: N images of a split, K codes of dimension Z.
"""

import io
import math
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from medgen import source
from medgen.config import fingerprint
from medgen.data.store import Split, Store, map_array
from medgen.errors import UserError
from medgen.io import open_atomic, write_atomic
from medgen.models import GenerativeModel
from medgen.training.distributed import World
from medgen.training.loader import Loader

BATCH_SIZE = 64
SHARD_SIZE = 16 * BATCH_SIZE  # images
CODE = ("data/conditions.py", "nn/*.py", "models/*.py", "training/latents.py")  # source files that decide the latents


class Latents:
    """Latents (N, *latent_shape) of a split in files, which are mapped into memory; see `medgen.priors.LatentArray`.

    Args:
        shards: the files, in order; all but the last have SHARD_SIZE rows.
        latent_shape: of one latent.
        codebook: (K, Z) vectors that the shards hold the numbers of; None if they hold latents.
    """

    def __init__(self, shards: list[NDArray[Any]], latent_shape: tuple[int, ...], codebook: Tensor | None) -> None:
        self._shards, self._codebook = shards, codebook
        self.shape = (sum(map(len, shards)), *latent_shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Latents (n, *latent_shape) of a slice or of row numbers (n,), float32 on the CPU."""
        numbers = np.arange(len(self))[rows] if isinstance(rows, slice) else rows.numpy()
        shape = self.shape[1:] if self._codebook is None else self.shape[2:]
        dtype = self._shards[0].dtype if self._shards else np.float32
        values = np.empty((len(numbers), *shape), dtype)
        shards, offsets = np.divmod(numbers, SHARD_SIZE)
        for shard in np.unique(shards):
            chosen = shards == shard
            values[chosen] = self._shards[shard][offsets[chosen]]
        if self._codebook is None:
            return torch.from_numpy(values)
        return F.embedding(torch.from_numpy(values.astype(np.int64)), self._codebook).movedim(-1, 1).contiguous()


@dataclass(frozen=True)
class Encoded:
    """Latents of a split's images."""

    means: Latents  # (N, *latent_shape) posterior means
    labels: Tensor  # (N,) int64, -1 where unlabelled
    variance: Tensor | None  # (*latent_shape) posterior variance, mean over the images; None without one
    split: Split


def encode_dataset(store: Store, model: GenerativeModel, digest: str, run: Path, world: World) -> list[Encoded]:
    """Latents of the splits train and val, encoded where an earlier call did not.

    Args:
        store: the dataset.
        model: the model, on its device.
        digest: SHA-256 of its weights.
        run: folder of the model's run.
        world: the processes that encode, each its own shards.

    Raises:
        UserError: the disk has too little space.
    """
    name = f"latents_{fingerprint(digest, store.fingerprint, source.fingerprint(*CODE))}"
    run.mkdir(parents=True, exist_ok=True)
    # another command that needs the same latents waits, and then reads them
    with FileLock(run / "encoding.lock") if world.is_main else nullcontext():
        if world.is_main:
            for old in run.glob("latents_*"):
                if old.name != name:
                    shutil.rmtree(old)
        world.barrier()
        return [encode(model, store.split(split), run / name / split, world) for split in ("train", "val")]


@torch.no_grad()
def encode(model: GenerativeModel, split: Split, folder: Path, world: World) -> Encoded:
    """Encode the images of a split whose shards are missing in `folder`, and open all of them.

    Raises:
        UserError: the disk has too little space.
    """
    codebook, shape = model.codebook, tuple(model.latent_shape)
    if codebook is not None:
        shape = shape[1:]
    dtype = np.dtype(np.float32) if codebook is None else np.min_scalar_type(len(codebook) - 1)
    num = len(split.images)
    shards = {
        folder / f"{number:05}.npy": range(start, min(start + SHARD_SIZE, num))
        for number, start in enumerate(range(0, num, SHARD_SIZE))
    }
    missing = {path: rows for path, rows in shards.items() if _open(path, (len(rows), *shape), dtype) is None}
    check_space(folder, sum(map(len, missing.values())) * math.prod(shape) * dtype.itemsize)
    world.barrier()  # all have looked before one writes
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        takes_conditions = model.space is not None
        loader = Loader(split, BATCH_SIZE, next(model.parameters()).device, with_conditions=takes_conditions)
        for path, rows in list(missing.items())[world.rank :: world.size]:
            _encode_shard(model, loader, path, rows, (len(rows), *shape), dtype)
    world.barrier()
    arrays = [_open(path, (len(rows), *shape), dtype) for path, rows in shards.items()]
    sums = [np.load(path.with_suffix(".variance.npy")) for path in shards if path.with_suffix(".variance.npy").exists()]
    return Encoded(
        means=Latents([array for array in arrays if array is not None], tuple(model.latent_shape), _on_cpu(codebook)),
        labels=torch.from_numpy(np.array(split.labels[:], dtype=np.int64)),
        variance=torch.from_numpy(sum(sums) / num).float() if sums else None,
        split=split,
    )


def check_space(folder: Path, num_bytes: int) -> None:
    """Raise UserError if the disk of `folder` has too little space for `num_bytes` more."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise UserError(
            f"{folder}: the latents of the images need {num_bytes / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB "
            "free; free space, remove latents_* folders of other runs, or choose a smaller latent"
        )


def _encode_shard(
    model: GenerativeModel, loader: Loader, path: Path, rows: range, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> None:
    """Write the latents or codes of these rows, of shape `shape`, and the sum of their posterior variances."""
    variance: Tensor | None = None
    with open_atomic(path) as file:
        header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(file, header)
        for start in range(0, len(rows), BATCH_SIZE):
            batch = loader.gather(torch.arange(rows.start + start, min(rows.start + start + BATCH_SIZE, rows.stop)))
            latent = model.encode(batch.image, batch.label, batch.conditions)
            found = latent.mean.float() if latent.codes is None else latent.codes
            file.write(np.ascontiguousarray(found.cpu().numpy(), dtype).data)
            if latent.logvar is not None:
                total = latent.logvar.double().exp().sum(0).cpu()
                variance = total if variance is None else variance + total
        if variance is not None:  # before the shard, which then is complete
            content = io.BytesIO()
            np.save(content, variance.numpy())
            write_atomic(path.with_suffix(".variance.npy"), content.getvalue())


def _open(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any] | None:
    """The shard in a file, mapped into memory; None if there is no complete one."""
    try:
        array = map_array(path)
    except ValueError:
        return None
    return array if (array.shape, array.dtype) == (shape, dtype) else None


def _on_cpu(codebook: Tensor | None) -> Tensor | None:
    return None if codebook is None else codebook.detach().float().cpu()
