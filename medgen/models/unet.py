"""U-Net: an image in, a mask out (system D; Ronneberger et al. 2015).

Down by max-pooling or strided convolution, up by transposed convolution or upsampling and convolution, with a skip
connection at every size: `model.down` and `model.up`.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from medgen.config import Model
from medgen.errors import UserError
from medgen.models.base import ImageModel, ModelOutput
from medgen.models.blocks import DoubleConv, double, halve

NUM_STAGES = 4  # halvings (Ronneberger et al.), fewer where the image has no more factors of two


class UNet(ImageModel):
    """Images (B, C, S, S) -> probabilities (B, K, S, S); K = 1 for a mask of 0 and 1, else the number of classes."""

    target = "mask"

    def __init__(
        self, params: Model, image_shape: tuple[int, int, int], num_classes: int, mask_classes: int = 2
    ) -> None:
        super().__init__()
        num_stages = next((n for n in range(NUM_STAGES, 0, -1) if image_shape[1] % 2**n == 0), 0)
        if num_stages == 0:
            raise UserError(f"preprocess.image_size: {image_shape[1]} is odd; a U-Net needs a multiple of 2")
        channels = [min(params.base_channels * 2**i, params.max_channels) for i in range(num_stages + 1)]
        self.mask_classes = mask_classes
        self.first = DoubleConv(image_shape[0], channels[0])
        self.halves = nn.ModuleList(halve(before, params.down) for before in channels[:-1])
        self.downs = nn.ModuleList(DoubleConv(a, b) for a, b in pairwise(channels))
        self.doubles = nn.ModuleList(double(b, a, params.up) for a, b in pairwise(channels))
        self.ups = nn.ModuleList(DoubleConv(2 * width, width) for width in channels[:-1])
        self.last = nn.Conv2d(channels[0], 1 if mask_classes == 2 else mask_classes, 1)

    def forward(self, image: Tensor, label: Tensor | None = None) -> ModelOutput:
        """Images (B, C, S, S) -> probabilities (B, K, S, S), float32, in the place of a reconstruction."""
        skips = [self.first(image)]
        for half, down in zip(self.halves, self.downs, strict=True):
            skips.append(down(half(skips[-1])))
        x = skips.pop()
        for doubled, up in zip(reversed(self.doubles), reversed(self.ups), strict=True):
            x = up(torch.cat([skips.pop(), doubled(x)], dim=1))
        logits = self.last(x).float()
        probabilities = torch.sigmoid(logits) if self.mask_classes == 2 else torch.softmax(logits, dim=1)
        return ModelOutput(reconstruction=probabilities, latent=None)

    def predict(self, image: Tensor, label: Tensor | None = None) -> ModelOutput:
        """As forward: nothing in it is random."""
        return self(image, label)  # type: ignore[no-any-return]
