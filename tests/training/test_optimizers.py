"""Optimizers, schedules, clipping and averages, each against torch's own or a slow formula."""

import math

import pytest
import torch
from torch import nn

from medgen.config import Phase, Schedule
from medgen.training import optimizers


def phase(**update):
    return Phase(**{"name": "a", "epochs": 1, "learning_rate": 0.1, "weight_decay": 0.0, **update})


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2)),
        ("adam", lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.2)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.2, momentum=0.9)),
    ],
)
def test_optimizers_step_as_torchs_plain_ones(name, reference):
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
    steps = [
        (optimizers.build_optimizer(phase(optimizer=name, weight_decay=0.2), [ours]), ours),
        (reference([theirs]), theirs),
    ]
    for optimizer, parameter in steps:
        for k in range(3):
            parameter.grad = torch.full((5,), 0.5 + k)
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("period_factor", [1, 2])
def test_cosine_restarts_are_torchs(period_factor):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3, period_factor, eta_min=0.1)
    ours = phase(schedule=Schedule(name="cosine_restarts", period=3, period_factor=period_factor, min_factor=0.1))
    for epoch in (0.0, 0.5, 1.0, 2.9, 3.0, 4.5, 6.0, 8.99, 9.0, 20.0):
        theirs.step(epoch)
        assert optimizers.rate_factor(ours, epoch, 10**6) == pytest.approx(optimizer.param_groups[0]["lr"]), epoch


def test_warmup_rises_to_the_schedule():
    warm = phase(warmup_steps=4)
    assert [optimizers.rate_factor(warm, 0.0, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


LOSSES = [3.0, 2.0, 2.1, 1.99999, 2.2, 1.5, 1.6, 1.6, 1.6, 1.6, 1.6, 1.6, 1.0]


def test_plateau_is_torchs():
    schedule = Schedule(name="plateau", patience=2, factor=0.5, min_factor=0.2)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2, min_lr=0.2)
    ours = optimizers.Plateau()
    factors = set()
    for loss in LOSSES:
        theirs.step(loss)
        ours.update(loss, schedule)
        assert ours.factor == pytest.approx(optimizer.param_groups[0]["lr"]), loss
        factors.add(ours.factor)
    assert {1.0, 0.5, 0.25} <= factors


def test_plateau_sees_a_loss_below_zero_stand_still():
    """The loss of `sigma` is half a logarithm: torch's rule would take one that creeps upwards for progress."""
    schedule, ours = Schedule(name="plateau", patience=3), optimizers.Plateau()
    for loss in (-1.0, -2.0, -2.5):
        ours.update(loss, schedule)
        assert (ours.best, ours.bad_epochs) == (loss, 0)
    for loss in (-2.49990, -2.49985, -2.49980, -2.49975):
        ours.update(loss, schedule)
    assert (ours.best, ours.factor) == (-2.5, 0.5)


def test_clipping_is_torchs_and_returns_the_norm_before():
    values = [torch.tensor([3.0, 4.0]), torch.tensor([12.0])]
    ours, theirs = ([nn.Parameter(torch.zeros_like(value)) for value in values] for _ in range(2))
    for parameters in (ours, theirs):
        for parameter, value in zip(parameters, values, strict=True):
            parameter.grad = value.clone()
    assert optimizers.clip_gradients([*ours, nn.Parameter(torch.zeros(1))], 1.0).item() == pytest.approx(13.0)
    nn.utils.clip_grad_norm_(theirs, 1.0)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    optimizers.clip_gradients(ours, 5.0)  # below the limit already
    torch.testing.assert_close(ours[0].grad, theirs[0].grad)


def test_set_rate_reaches_every_group():
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)], lr=1.0)
    optimizers.set_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_the_average_is_exponential_over_weights_and_batch_statistics():
    model, decay = network(), 0.5
    average = optimizers.AveragedWeights(model, decay)
    names = ["0.weight", "1.running_mean", "1.running_var"]
    expected = {name: model.state_dict()[name].clone() for name in names}
    for k in range(1, 13):
        model(torch.randn(8, 3))  # moves the running statistics
        with torch.no_grad():
            model[0].weight.add_(0.1)
        average.update(torch.tensor(0.0))
        step = 1 - min(decay, (1 + k) / (10 + k))
        for name in names:
            expected[name] += step * (model.state_dict()[name] - expected[name])
    live = {name: value.clone() for name, value in model.state_dict().items()}
    average.swap()
    for name in names:
        torch.testing.assert_close(model.state_dict()[name], expected[name])
        assert not torch.allclose(model.state_dict()[name], live[name])
    assert model.state_dict()["1.num_batches_tracked"] == 12  # a count is not averaged
    average.swap()
    assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())


def test_a_skipped_update_leaves_the_average():
    model = network()
    average = optimizers.AveragedWeights(model, 0.9)
    before = [value.clone() for value in average.average]
    with torch.no_grad():
        model[0].weight.add_(1.0)
    average.update(torch.tensor(1.0))
    assert all(torch.equal(one, other) for one, other in zip(before, average.average, strict=True))


def test_the_average_is_taken_up_from_a_checkpoint():
    model = network()
    average, again = optimizers.AveragedWeights(model, 0.9), optimizers.AveragedWeights(network(), 0.9)
    for _ in range(2):
        with torch.no_grad():
            model[0].weight.mul_(math.pi)
        average.update(torch.tensor(0.0))
    again.load_state_dict(average.state_dict())
    assert again.num_updates == 2
    assert all(torch.equal(one, other) for one, other in zip(average.average, again.average, strict=True))
