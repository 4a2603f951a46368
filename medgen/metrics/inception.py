"""Inception Score, and the Inception features for FID as in published results.

inception = load_inception(checked_weights("inception"))
output = inception(generated)
frechet_distance(inception(real).features, output.features), inception_score(output.logits)  # FID, IS
"""

import io
import pickle
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medgen.data.images import to_floats
from medgen.errors import UserError

NUM_FEATURES = 2048
NUM_CLASSES = 1008
NUM_SPLITS = 10  # the Inception Score is the mean over this many random splits, as in the paper
_BATCH_SIZE = 16  # at 299 x 299 pixels and 64 channels, a larger batch takes gigabytes


class InceptionOutput(NamedTuple):
    """The network's output for N images, on the CPU."""

    features: Tensor  # (N, 2048), for FID and KID
    logits: Tensor  # (N, 1008), without the last layer's bias, for the Inception Score


class Inception(nn.Module):
    """The Inception network of 2015 for images of any size.

    Grey is repeated to three channels and values are rounded to uint8, as in a PNG. The network resizes to 299 x 299 as
    TensorFlow 1 did; published values depend on this.
    """

    def __init__(self, network: nn.Module) -> None:
        """`network`: uint8 (B, 3, H, W) -> (features (B, 2048), logits (B, 1008))."""
        super().__init__()
        self.network = network

    @torch.no_grad()
    def forward(self, images: Tensor) -> InceptionOutput:
        """The output for images (N, 1 or 3, H, W), as stored or floats in [0, 1]."""
        device = next(self.network.parameters()).device
        parts = [self.network(to_uint8_rgb(part).to(device)) for part in torch.split(images, _BATCH_SIZE)]
        features, logits = (torch.cat([part[i].float().cpu() for part in parts]) for i in range(2))
        return InceptionOutput(features, logits)


def load_inception(path: Path) -> Inception:
    """The network with weights from a file in torch-fidelity's format, on the CPU. Nothing is downloaded.

    Raises:
        UserError: the file is unreadable or does not have these weights.

    Sources: Szegedy et al.: Rethinking the Inception architecture, 2016, as TensorFlow's inception-2015-12-05;
    converted to PyTorch by torch-fidelity (Obukhov et al., 2020).
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    expected = "expected torch-fidelity's Inception weights; run `medgen weights fetch inception` again"
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        # torch-fidelity unpickles without a check, so it gets a copy of the checked tensors.
        copy = io.BytesIO()
        torch.save({str(name): torch.as_tensor(value) for name, value in state.items()}, copy)
        del state
        copy.seek(0)
        network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], copy)
    except (OSError, EOFError, pickle.UnpicklingError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: not readable ({reason}); {expected}") from None
    return Inception(network).eval()


def to_uint8_rgb(images: Tensor) -> Tensor:
    """Images (N, 1 or 3, H, W), as stored or floats in [0, 1] -> (N, 3, H, W) uint8."""
    if images.dtype != torch.uint8:
        images = (to_floats(images).clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    return images.expand(-1, 3, -1, -1)


def inception_score(logits: Tensor, seed: int = 0) -> float:
    """exp of the mean KL between each image's and the set's class probabilities, mean over ten random splits.

    From 1 (equal probabilities for all images) to the number of classes. Biased downward in small sets: the score of n
    images is at most n. From logits (N, K).

    Source: Salimans et al.: Improved techniques for training GANs, 2016, section 4.
    """
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    scores = []
    for part in logits.double()[order].chunk(NUM_SPLITS):
        shares = part.softmax(dim=1)
        divergence = shares * (part.log_softmax(dim=1) - shares.mean(dim=0).log())
        scores.append(divergence.sum(dim=1).mean().exp())
    return float(torch.stack(scores).mean())
