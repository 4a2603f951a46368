"""Evaluate how near samples come to train images.

Shapes: N images, C channels, H W height and width.
"""

from torch import Tensor

from medgen.evaluation.context import EvaluationContext, FeatureSets
from medgen.metrics import privacy

NUM_CLOSEST = 10  # pairs in nearest_train.png


def evaluate_privacy(
    context: EvaluationContext, features: FeatureSets, samples: Tensor, train: Tensor, held_out: Tensor
) -> tuple[dict[str, float], privacy.ClosestPairs]:
    """The `privacy/` metrics of samples (N, C, H, W) relative to held-out images, and the closest pairs."""
    patients = context.held_out.patients
    # the content features alone, since a blurred copy is a copy
    by_features = privacy.find_copies(
        privacy.nearest_by_features(features.samples.content, features.train.content),
        privacy.nearest_by_features(features.held_out.content, features.train.content),
        patients,
    )
    by_pixels = privacy.find_copies(
        privacy.nearest_by_pixels(samples, train), privacy.nearest_by_pixels(held_out, train), patients
    )
    metrics = {f"privacy/{name}": value for name, value in privacy.metrics(by_features, by_pixels).items()}
    return metrics, privacy.closest_pairs(by_features, by_pixels, NUM_CLOSEST)
