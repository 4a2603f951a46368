"""Train a small U-Net on images with masks, and compare the masks that it finds with given ones.

It measures samples that were requested with a mask: their agreement with it, and their use for training.

Shapes: N images, C channels, H W height and width.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from medgen.config import Model, seed_of
from medgen.data.images import Images, StoredImages, to_floats
from medgen.data.store import Split, Store
from medgen.evaluation.fitting import fit
from medgen.metrics.segmentation import class_indices, foreground_scores
from medgen.models.unet import UNet
from medgen.training.extractor import change_greys

BATCH_SIZE = 16
LEARNING_RATE = 3e-3
CHANNELS = 16  # at full size


class StoredMasks:
    """Masks (N, H, W) uint8 of class numbers of some rows of a split, read when they are indexed by rows (B,)."""

    def __init__(self, split: Split, rows: Tensor) -> None:
        """`rows` (N,) of images that have a mask."""
        assert split.masks is not None
        self._masks, self._rows = split.masks, rows

    def __getitem__(self, index: Tensor) -> Tensor:
        return torch.from_numpy(self._masks[self._rows[index].numpy()][:, 0])


class MaskedImages(NamedTuple):
    """Images and their masks."""

    images: Images  # (N, C, H, W) as stored
    masks: StoredMasks  # (N, H, W)

    @classmethod
    def stored(cls, split: Split, rows: Tensor) -> "MaskedImages":
        """Images of a split with rows (N,) that have a mask."""
        return cls(StoredImages(split, rows), StoredMasks(split, rows))


def train_segmenter(sources: Sequence[MaskedImages], store: Store, steps: int, seed: int, device: torch.device) -> UNet:
    """A U-Net trained to predict masks from their images, with equally many of each source in a batch."""
    sizes = [len(part) for part in torch.arange(BATCH_SIZE).tensor_split(len(sources))]

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images, masks = [], []
        for source, size in zip(sources, sizes, strict=True):
            rows = torch.randint(len(source.images), (size,), generator=generator)
            images.append(to_floats(source.images[rows]))
            masks.append(source.masks[rows])
        return torch.cat(images), torch.cat(masks)

    return train_unet(draw, store.image_shape, store.preprocess.mask_classes, steps, seed, device)


def train_unet(
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    image_shape: tuple[int, ...],
    num_classes: int,
    steps: int,
    seed: int,
    device: torch.device,
) -> UNet:
    """A U-Net trained on batches of images (B, C, H, W) in [0, 1] and maps (B, H, W) that `draw` gives.

    Maps are class numbers of masks of `num_classes`, or floats in [0, 1], of which `num_classes` is 2.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = UNet(Model(name="unet", base_channels=CHANNELS), image_shape, 0, num_classes).to(device)

    def loss_of(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of(seed, step))
        images, maps = draw(generator)
        predicted, target = network(change_greys(images, generator).to(device)).prediction, maps.to(device)
        if target.is_floating_point():
            return F.mse_loss(predicted[:, 0], target)
        if num_classes == 2:
            return F.binary_cross_entropy(predicted[:, 0], target.float())
        return F.nll_loss(predicted.clamp_min(1e-7).log(), target.long())

    fit(list(network.parameters()), loss_of, steps, LEARNING_RATE)
    return network.eval()


@torch.no_grad()
def score_masks(network: UNet, pairs: MaskedImages, batch_size: int) -> Tensor:
    """Dice and IoU (N, 2), float64, of the mask that the network finds in each image with the given one."""
    device, scores = next(network.parameters()).device, []
    for rows in torch.split(torch.arange(len(pairs.images)), batch_size):
        predicted = network.predict(to_floats(pairs.images[rows].to(device))).prediction
        scores.append(foreground_scores(class_indices(predicted).cpu(), pairs.masks[rows], network.mask_classes))
    return torch.cat(scores)
