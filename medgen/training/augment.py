"""Random changes of training images and their masks, with torchvision's transforms v2.

The draws of an image come from a generator of its own on the CPU, so that they depend on its seed only: not on the
device, nor on the other images of the batch.

Shapes: B batch, C channels, H W height and width.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from medgen.config import Augment, Elastic, Intensity
from medgen.data.conditions import ConditionSpace
from medgen.errors import UserError


def augment_images(
    images: Tensor, masks: Tensor | None, params: Augment, seeds: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """Images (B, C, H, W) in [0, 1] and their masks (B, 1, H, W), each pair changed by the draws of its seed.

    Image and mask get the same flip, affine map and deformation, in this order: images by bilinear interpolation, masks
    by the nearest pixel, so that they keep their class numbers. Then the grey values of the image change.
    """
    pairs = [
        _augment_pair(image, None if masks is None else masks[row], params, torch.Generator().manual_seed(seed))
        for row, (image, seed) in enumerate(zip(images, seeds, strict=True))
    ]
    return torch.stack([image for image, _ in pairs]), None if masks is None else torch.stack([m for _, m in pairs])


def check_augment(params: Augment, sides: Sequence[int], space: ConditionSpace | None = None) -> None:
    """Check that the changes fit images of these sides, and the conditions that a model takes.

    Raises:
        UserError: there are any, and the items are volumes or the model takes maps; the deformation is smoothed over
            more pixels than the image has.
    """
    if len(sides) == 3 and params != Augment():
        raise UserError("train.augment: changes images, and the dataset has volumes; expected no augment. Remove it")
    if space is not None and space.map_channels and params != Augment():
        raise UserError(
            f"train.augment: does not change the conditions {', '.join(space.map_fields)}, which the model takes; "
            "expected no augment. Remove it"
        )
    limit = (min(sides) - 1) / 4  # the window of the Gaussian reaches four deviations to each side
    if params.elastic.alpha > 0 and params.elastic.sigma > limit:
        raise UserError(
            f"train.augment.elastic.sigma: found {params.elastic.sigma:g} pixels, expected at most {limit:g}, a "
            "quarter of the image's shorter side"
        )


def _augment_pair(
    image: Tensor, mask: Tensor | None, params: Augment, generator: torch.Generator
) -> tuple[Tensor, Any]:
    """One image (C, H, W) and its mask (1, H, W)."""
    from torchvision import tv_tensors  # slow to import, and most trainings do not need it
    from torchvision.transforms.v2 import functional as F

    pair: list[Any] = [tv_tensors.Image(image), *([] if mask is None else [tv_tensors.Mask(mask)])]
    if params.vertical_flip and _uniform(generator, 1.0) < 0.0:
        pair = [F.vertical_flip(each) for each in pair]
    affine = params.affine
    if affine.degrees or affine.translate or affine.scale:
        height, width = image.shape[-2:]
        drawn: dict[str, Any] = {
            "angle": _uniform(generator, affine.degrees),
            "translate": [_uniform(generator, affine.translate * side) for side in (width, height)],
            "scale": 1.0 + _uniform(generator, affine.scale),
            "shear": [0.0, 0.0],
        }
        pair = [F.affine(each, **drawn, interpolation=F.InterpolationMode.BILINEAR) for each in pair]
    if params.elastic.alpha:
        shifts = _displacement(params.elastic, image.shape[-2:], generator).to(image.device)
        pair = [F.elastic(each, shifts) for each in pair]
    image, *changed = (each.as_subclass(Tensor) for each in pair)
    return _change_intensity(image, params.intensity, generator), changed[0] if changed else None


def _displacement(params: Elastic, sides: Sequence[int], generator: torch.Generator) -> Tensor:
    """Shifts (1, H, W, 2) along x and y for `elastic`, as torchvision's ElasticTransform draws them.

    The Gaussian is applied along rows and then along columns, which is the same and many times as fast.
    """
    from torchvision.transforms.v2 import functional as F

    size = int(8 * params.sigma + 1) | 1  # odd
    shifts = []
    for side in reversed(sides):
        noise = 2.0 * torch.rand(1, 1, *sides, generator=generator) - 1.0
        for kernel in ([size, 1], [1, size]):
            noise = F.gaussian_blur(noise, kernel, [params.sigma, params.sigma])
        shifts.append(noise * params.alpha / side)
    return torch.stack(shifts, dim=-1)[0]


def _change_intensity(image: Tensor, params: Intensity, generator: torch.Generator) -> Tensor:
    from torchvision.transforms.v2 import functional as F

    if params.brightness:
        image = F.adjust_brightness(image, 1.0 + _uniform(generator, params.brightness))
    if params.contrast:
        image = F.adjust_contrast(image, 1.0 + _uniform(generator, params.contrast))
    if params.gamma:
        image = F.adjust_gamma(image, math.exp(_uniform(generator, math.log1p(params.gamma))))
    if params.noise:
        deviation = abs(_uniform(generator, params.noise))
        noise = torch.randn(image.shape, generator=generator).to(image.device)
        image = (image + deviation * noise).clamp(0.0, 1.0)
    return image


def _uniform(generator: torch.Generator, limit: float) -> float:
    """A number between -limit and limit."""
    return limit * (2.0 * float(torch.rand((), generator=generator)) - 1.0)
