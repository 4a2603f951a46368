"""U-Net for segmentation (Ronneberger et al. 2015).

`model.down` selects max-pooling or strided convolutions, `model.up` transposed convolutions or bilinear upsampling.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from medgen.config import Model
from medgen.errors import UserError
from medgen.models.base import ImageModel, ModelOutput
from medgen.nn.blocks import DoubleConv, conv, downsample, upsample
from medgen.nn.conditions import Conditions

NUM_STAGES = 4  # downsamplings (Ronneberger et al.); fewer if the image side has fewer factors of two


class UNet(ImageModel):
    """Images (B, C, H, W) -> probabilities (B, K, H, W); K = 1 for a mask of 0 and 1, else the number of classes."""

    target = "mask"
    encoder_parts = ("first", "halves", "downs")

    def __init__(self, params: Model, image_shape: tuple[int, ...], num_classes: int, mask_classes: int = 2) -> None:
        super().__init__()
        num_stages = next((n for n in range(NUM_STAGES, 0, -1) if all(side % 2**n == 0 for side in image_shape[1:])), 0)
        if num_stages == 0:
            shown = " x ".join(map(str, image_shape[1:]))
            raise UserError(f"preprocess.image_size: {shown} has an odd side; a U-Net needs multiples of 2")
        channels = [min(params.base_channels * 2**i, params.max_channels) for i in range(num_stages + 1)]
        self.mask_classes, dims = mask_classes, params.dims
        self.first = DoubleConv(image_shape[0], channels[0], dims)
        self.halves = nn.ModuleList(downsample(before, params.down, dims) for before in channels[:-1])
        self.downs = nn.ModuleList(DoubleConv(before, after, dims) for before, after in pairwise(channels))
        self.doubles = nn.ModuleList(upsample(after, before, params.up, dims) for before, after in pairwise(channels))
        self.ups = nn.ModuleList(DoubleConv(2 * width, width, dims) for width in channels[:-1])
        self.last = conv(dims, channels[0], 1 if mask_classes == 2 else mask_classes, 1)

    def forward(self, image: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> ModelOutput:
        """Images (B, C, H, W) -> probabilities (B, K, H, W), float32; label and conditions are not used."""
        skips = [self.first(image)]
        for down, stage in zip(self.halves, self.downs, strict=True):
            skips.append(stage(down(skips[-1])))
        x = skips.pop()
        for up, stage in zip(reversed(self.doubles), reversed(self.ups), strict=True):
            x = stage(torch.cat([skips.pop(), up(x)], dim=1))
        logits = self.last(x).float()
        probabilities = torch.sigmoid(logits) if self.mask_classes == 2 else torch.softmax(logits, dim=1)
        return ModelOutput(prediction=probabilities, latent=None)

    def predict(self, image: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> ModelOutput:
        """Same as `forward`, which has no randomness."""
        return self(image, label)  # type: ignore[no-any-return]
