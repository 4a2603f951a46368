"""Separate one class of the test split, the normal one, from the others by scores of anomaly."""

import torch
from torch import Tensor

from medgen.config import seed_of
from medgen.console import warn
from medgen.data.images import StoredImages, to_floats
from medgen.errors import UserError
from medgen.evaluation.context import EvaluationContext, map_rows
from medgen.inference.anomaly import SCORES, find_anomalies
from medgen.metrics.c2st import MIN_GROUPS, auc_interval
from medgen.metrics.intervals import group_rows, interval_metrics, select_groups


def score_anomalies(context: EvaluationContext) -> Tensor | None:
    """Scores (N, 3) of the held-out images, in the order of SCORES; None without evaluate.normal_class.

    Raises:
        UserError: the prior is conditional and has seen no image of the normal class.
    """
    normal = context.normal_class
    if normal is None:
        return None
    if context.prior.conditional and bool(context.prior.frequencies[normal] == 0):
        raise UserError(
            f"evaluate.normal_class: the train split has no image of {context.params.normal_class!r}, so the prior has "
            "no density of it; choose a class with train images"
        )

    def score(rows: Tensor) -> Tensor:
        images = to_floats(StoredImages(context.held_out)[rows].to(context.device))
        labels = torch.full((len(rows),), normal, device=context.device)
        generator = torch.Generator().manual_seed(seed_of(context.params.seed, 5, int(rows[0])))
        return find_anomalies(context.model, context.prior, images, labels, generator).scores

    return map_rows(context, len(context.held_out), score)


def evaluate_anomalies(context: EvaluationContext, scores: Tensor | None) -> dict[str, float]:
    """The `anomaly/` metrics: AUC of each score between the normal class and all others, with intervals by patient.

    Unlabelled images do not count. With fewer than ten patients on either side the metrics are left out with a warning.
    """
    if scores is None:
        return {}
    is_normal = torch.eq(context.labels, torch.tensor(context.normal_class))
    normal, others = (rows.nonzero()[:, 0] for rows in (is_normal, ~is_normal & (context.labels >= 0)))
    of_normal, of_others = (select_groups(context.patients, rows) for rows in (normal, others))
    counts = [
        len(group_rows(len(rows), groups)) if len(rows) else 0
        for rows, groups in ((normal, of_normal), (others, of_others))
    ]
    if min(counts) < MIN_GROUPS:
        warn(
            f"evaluate.normal_class: the {context.held_out.name} split has {counts[0]} patients of class "
            f"{context.params.normal_class} and {counts[1]} of others, expected at least {MIN_GROUPS} each; metrics of "
            "anomalies are left out"
        )
        return {}
    one_fold = torch.zeros(len(normal)), torch.zeros(len(others))
    aucs = {
        f"auc_{name}": auc_interval(column[normal], column[others], *one_fold, of_normal, of_others)
        for name, column in zip(SCORES, scores.unbind(dim=1), strict=True)
    }
    return interval_metrics("anomaly", aucs)
