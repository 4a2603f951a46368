"""Objectives are metrics with a direction, never a loss."""

import pytest

from medgen.config import Beta, Evaluate, Loss, Model, Phase, Tracking, Train, Weights
from medgen.errors import UserError
from medgen.tracking import history
from medgen.training import train
from medgen.tune.objective import choose_objective

BOTH = Evaluate(extractors=("domain", "inception"))


@pytest.mark.parametrize(
    ("name", "target", "keys", "directions"),
    [
        (None, "image", ("generation/mmd_domain",), ("minimize",)),
        ("generation/kid_domain", "image", ("generation/kid_domain",), ("minimize",)),
        (None, "mask", ("segmentation/dice_foreground",), ("maximize",)),
        ("reconstruction/ssim", "image", ("reconstruction/ssim",), ("maximize",)),
        ("generation/fd_inception", "image", ("generation/fd_inception",), ("minimize",)),
        ("generation/recall", "image", ("generation/recall",), ("maximize",)),
        ("privacy/copy_rate", "image", ("privacy/copy_rate",), ("minimize",)),
        ("segmentation/iou_2", "mask", ("segmentation/iou_2",), ("maximize",)),
        ("pareto", "image", ("reconstruction/ms_ssim", "generation/mmd_domain"), ("minimize", "minimize")),
    ],
)
def test_keys_and_directions_of_objectives(name, target, keys, directions):
    objective = choose_objective(name, target, 128, BOTH)
    assert (objective.keys, objective.directions) == (keys, directions)


def test_pareto_uses_ssim_for_small_images():
    objective = choose_objective("pareto", "image", 64, Evaluate())
    assert objective.values({"reconstruction/ssim": 0.75, "generation/mmd_domain": 2.0}) == [0.25, 2.0]


@pytest.mark.parametrize(
    ("name", "target", "side", "evaluate", "message"),
    [
        ("train/loss", "image", 64, Evaluate(), "lower bounds"),
        ("val/loss", "image", 64, Evaluate(), "lower bounds"),
        ("loss", "mask", 64, Evaluate(), "lower bounds"),
        ("generation/kid", "image", 64, Evaluate(), "not a metric that can be maximized or minimized"),
        ("reconstruction/pca_ssim", "image", 64, Evaluate(), "not a metric that can be maximized or minimized"),
        ("generation/kid_domain_floor", "image", 64, Evaluate(), "not a metric that can be maximized or minimized"),
        ("segmentation/dice_foreground", "image", 64, Evaluate(), "a model of images"),
        ("segmentation/dice", "mask", 64, Evaluate(), "segmentation/dice_foreground for masks"),
        ("generation/kid_domain", "mask", 64, Evaluate(), "a model of masks"),
        ("pareto", "mask", 64, Evaluate(), "not a metric that can be maximized or minimized"),
        ("reconstruction/ms_ssim", "image", 64, Evaluate(), "larger images than 64"),
        ("generation/kid_inception", "image", 64, Evaluate(), r"evaluate.extractors: \[domain, inception\]"),
        ("generation/kid_local", "image", 64, Evaluate(), r"evaluate.extractors: \[domain, local\]"),
    ],
)
def test_invalid_objectives_are_refused(name, target, side, evaluate, message):
    with pytest.raises(UserError, match=message) as error:
        choose_objective(name, target, side, evaluate)
    assert str(error.value).startswith("tune.objective: ")


def test_a_missing_metric_is_an_error():
    with pytest.raises(UserError, match="label_accuracy_wrong is not among this model's metrics"):
        choose_objective("generation/label_accuracy_wrong", "image", 64, Evaluate()).values(
            {"reconstruction/ssim": 1.0}
        )


def test_the_former_name_of_label_accuracy_is_read_with_a_warning(capsys):
    objective = choose_objective("generation/label_agreement_wrong", "image", 64, Evaluate())
    assert objective.name == "generation/label_accuracy_wrong"
    assert "label_agreement_wrong was renamed to generation/label_accuracy_wrong" in capsys.readouterr().err


@pytest.mark.slow
def test_the_loss_is_lowest_at_the_lower_bounds_of_beta_and_weights(tiny_project):
    """The reason why a loss cannot be an objective."""
    betas, weights = (1e-3, 1.0), (0.1, 1.0)
    losses = {}
    for beta in betas:
        for weight in weights:
            phase = Phase(name="one", epochs=2, learning_rate=1e-3, beta=Beta(end=beta))
            scratch = train.run(
                tiny_project,
                model=Model(base_channels=8, latent_size=8, latent_channels=4),
                loss=Loss(weights=Weights(l1=weight, ssim=0.5 * weight)),
                train=Train(batch_size=16, phases=(phase,)),
                tracking=Tracking(enabled=False),
            )
            losses[beta, weight] = history(scratch)[-1]["train/loss"]
    assert min(losses, key=losses.__getitem__) == (min(betas), min(weights))
    for weight in weights:
        assert losses[betas[0], weight] < losses[betas[1], weight]
