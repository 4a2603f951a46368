"""The main metrics of an evaluation, in the order in which tables show them."""

from collections.abc import Mapping

SUMMARY = (
    "segmentation/dice_foreground",
    "segmentation/iou_foreground",
    "reconstruction/ssim",
    "reconstruction/psnr",
    "generation/c2st_auc",
    "generation/spectrum_distance",
    "generation/mmd_domain",
    "generation/kid_domain",
    "generation/fd_domain",
    "generation/precision",
    "generation/recall",
    "generation/label_accuracy",
    "utility/gain_both",
    "utility/gain_dice_both",
    "privacy/copy_rate",
    "latent/kl_nats",
)


def summarize(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those of `SUMMARY` that an evaluation has."""
    return {name: metrics[name] for name in SUMMARY if name in metrics}
