"""Inception Score and the features of FID: a network trained on photographs, which published figures look through.

inception = load_inception(checked_weights("inception"))
seen = inception(generated)
frechet_distance(inception(real).features, seen.features), inception_score(seen.logits)  # FID, IS
"""

import io
import pickle
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medgen.errors import UserError

NUM_FEATURES = 2048
NUM_CLASSES = 1008
NUM_SPLITS = 10  # of the images whose Inception Scores are averaged, as in the paper
_BATCH_SIZE = 16  # images at 299 x 299 through a network that makes 64 of each: a larger batch takes gigabytes


class Seen(NamedTuple):
    """What the network says of N images, on the CPU."""

    features: Tensor  # (N, 2048), for FID and KID
    logits: Tensor  # (N, 1008), without the last layer's bias, for the Inception Score


class Inception:
    """Images of any size and range -> what the Inception network of 2015 says of them.

    Grey is repeated to three channels; values are rounded to bytes, as a PNG holds them; the network itself
    resizes to 299 x 299 as TensorFlow 1 did, on which all published figures rest.
    """

    def __init__(self, network: nn.Module) -> None:
        """`network`: bytes (B, 3, H, W) -> (features (B, 2048), logits (B, 1008))."""
        self.network = network

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Seen:
        """`images`: (N, 1 or 3, H, W), uint8, or floats in [0, 1]."""
        device = next(self.network.parameters()).device
        parts = [self.network(to_bytes(part).to(device)) for part in torch.split(images, _BATCH_SIZE)]
        features, logits = (torch.cat([part[i].float().cpu() for part in parts]) for i in range(2))
        return Seen(features, logits)

    def to(self, device: torch.device) -> "Inception":
        """Moves the network."""
        self.network.to(device)
        return self


def load_inception(path: Path) -> Inception:
    """The network with weights from a file in the format of torch-fidelity, on the CPU. Downloads nothing.

    Raises:
        UserError: the file holds something else.

    Sources: Szegedy et al.: Rethinking the Inception architecture, 2016, as TensorFlow's inception-2015-12-05;
    carried to PyTorch by torch-fidelity (Obukhov et al., 2020).
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    expected = "expected torch-fidelity's Inception weights; run `medgen weights fetch inception` again"
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        # torch-fidelity unpickles what it is given without a check: it is given a copy that was written here.
        copy = io.BytesIO()
        torch.save({str(name): torch.as_tensor(value) for name, value in state.items()}, copy)
        del state
        copy.seek(0)
        network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], copy)
    except (OSError, EOFError, pickle.UnpicklingError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: not readable ({reason}); {expected}") from None
    return Inception(network.eval())


def to_bytes(images: Tensor) -> Tensor:
    """Images (N, 1 or 3, H, W), uint8 or floats in [0, 1] -> (N, 3, H, W) uint8."""
    if images.is_floating_point():
        images = (images.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    return images.expand(-1, 3, -1, -1)


def inception_score(logits: Tensor, seed: int = 0) -> float:
    """exp of the mean KL of each image's classes from the set's, averaged over ten random parts, by torchmetrics.

    From 1 (all images alike to the network) to the number of classes. Biased downward in small sets: a part
    of n images cannot reach more than n.

    Args:
        logits: (N, K).
        seed: of the cut into parts.

    Source: Salimans et al.: Improved techniques for training GANs, 2016, section 4.
    """
    from torchmetrics.image.inception import InceptionScore

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # it warns that it keeps what it is given, and of the spread of one part
        torch.manual_seed(seed)
        metric = InceptionScore(feature=_AsTheyAre(logits.shape[1]), splits=NUM_SPLITS)
        metric.update(logits.double())
        return float(metric.compute()[0])


class _AsTheyAre(nn.Identity):
    """Stands where torchmetrics has its network: the images have been through one, once for all metrics."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
