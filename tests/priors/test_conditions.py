"""Priors and the refiner learn conditions besides the class, alone and together, and keep them in their files."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from medgen.config import Preprocess, Prior
from medgen.config import Refiner as RefinerParams
from medgen.data.conditions import ConditionField, ConditionSpace
from medgen.errors import UserError
from medgen.nn.conditions import Conditions, encode_map
from medgen.priors import find_conditions, load_prior, save_prior
from medgen.priors.flow import Flow
from medgen.priors.gaussian import Normal
from medgen.priors.refiner import Refiner, load_refiner, save_refiner
from medgen.priors.tokens import Tokens

KINDS = {
    "findings": {"kind": "multilabel"},
    "mask": {"kind": "mask"},
    "age": {"kind": "number", "low": 0, "high": 100},
}
SPACE = ConditionSpace.from_rows(Preprocess(conditions=KINDS), [{"findings": "a+b"}])
assert SPACE is not None
MODEL = SimpleNamespace(conditional=False, space=None)  # a decoder that takes no conditions
CODEBOOK = torch.eye(6, 3) + 0.1 * torch.arange(6)[:, None]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw_conditions(count, seed=0):
    """Random findings a and b, ages, and masks of the left or the right half."""
    values = torch.zeros(count, SPACE.size)
    values[:, 0] = values[:, 3] = 1.0
    values[:, 1:3] = torch.rand(count, 2, generator=generator(seed)).round()
    values[:, 4] = torch.rand(count, generator=generator(seed + 1))
    left = torch.rand(count, generator=generator(seed + 2)) < 0.5
    mask = torch.zeros(count, 1, 16, 16, dtype=torch.long)
    mask[left, :, :, :8] = mask[~left, :, :, 8:] = 1
    return Conditions(values, encode_map(ConditionField("mask", "mask", channels=2), mask, torch.ones(count)))


def latents_of(conditions, noise=0.3):
    """(N, 4, 4, 4): each channel is one of finding a, finding b, age and mask."""
    count = len(conditions)
    latents = noise * torch.randn(count, 4, 4, 4, generator=generator(9))
    latents[:, :2] += 2.0 * conditions.values[:, 1:3, None, None]
    latents[:, 2] += 3.0 * conditions.values[:, 4, None, None]
    return latents + 2.0 * F.adaptive_avg_pool2d(conditions.maps[:, 1:], 4) * torch.tensor([0, 0, 0, 1])[:, None, None]


def codes_of(conditions):
    """Codes (N, 3, 3): finding a chooses one of two codes, in the half of the mask one of the next two."""
    inside = F.adaptive_avg_pool2d(conditions.maps[:, 1], (3, 3)).round().long()
    return conditions.values[:, 1, None, None].long() + 2 * inside


def train(prior, latents, conditions, steps, rate=5e-3):
    labels = torch.full((len(latents),), -1)
    optimizer = torch.optim.Adam(prior.network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for step in range(steps):
        rows = torch.randint(len(latents), (128,), generator=generator(step))
        loss = prior.loss(latents[rows], labels[rows], generator(step), conditions[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return prior


@pytest.fixture(scope="module")
def flow():
    conditions = draw_conditions(1500)
    latents = latents_of(conditions)
    params = Prior(name="flow", channels=32, blocks=2, dropout=0.0, sampling_steps=8)
    return train(Flow.create(latents, None, 0, params, None, None, SPACE), latents, conditions, 250)


@pytest.fixture(scope="module")
def untrained():
    """A flow whose network has random weights, so that its output is not 0."""
    params = Prior(name="flow", channels=8, blocks=1, sampling_steps=2)
    made = Flow.create(torch.randn(30, 4, 4, 4, generator=generator()), None, 0, params, None, None, SPACE)
    for parameter in made.network.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator(1))
    return made


def request(prior, text, count=200, **params):
    """Mean latent (4, 4, 4) of samples with requested conditions."""
    other = type(prior).restore(*prior.state())
    other.params = other.params.model_copy(update=params)
    one = find_conditions(text, SPACE, other, MODEL, half)
    return other.sample(count, None, generator(5), None if one is None else one.expand(count))


def half(_field, name):
    """Class numbers (1, 16, 16) of a mask of the left or the right half."""
    mask = np.zeros((1, 16, 16), np.uint8)
    mask[..., slice(8) if name == "left" else slice(8, None)] = 1
    return mask


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("findings=a", {0: 2.0, 1: 0.0}),
        ("findings=a+b", {0: 2.0, 1: 2.0}),
        ("findings=no finding,age=100", {0: 0.0, 1: 0.0, 2: 3.0}),
        ("age=20", {2: 0.6}),
        ("age=80,findings=b", {0: 0.0, 1: 2.0, 2: 2.4}),
    ],
)
def test_flow_samples_have_the_requested_findings_and_number(flow, text, expected):
    mean = request(flow, text).mean((0, 2, 3))
    for channel, value in expected.items():
        assert float(mean[channel]) == pytest.approx(value, abs=0.35), channel


@pytest.mark.slow
def test_flow_samples_follow_the_mask(flow):
    for name, inside in (("left", slice(0, 2)), ("right", slice(2, 4))):
        mean = request(flow, f"mask={name}")[:, 3].mean((0, 1))
        outside = slice(2, 4) if name == "left" else slice(0, 2)
        assert float(mean[inside].mean()) > 1.5 > 0.5 > float(mean[outside].mean())


@pytest.mark.slow
def test_conditions_that_are_left_out_vary_as_in_the_train_split(flow):
    drawn = request(flow, "age=50", count=400)
    has_finding = drawn[:, 0].mean((1, 2)) > 1.0
    assert 0.35 < float(has_finding.float().mean()) < 0.65
    ages = request(flow, "findings=a", count=400)[:, 2].mean((1, 2)) / 3.0
    assert float(ages.mean()) == pytest.approx(0.5, abs=0.15)
    assert float(ages.std()) > 0.15, "of a requested age it is 0.03, uniform 0.29"


@pytest.mark.slow
def test_guidance_0_ignores_conditions_and_2_strengthens_them(flow):
    def age(guidance, value):
        return float(request(flow, f"age={value}", guidance=guidance)[:, 2].mean())

    assert age(0.0, 0) == age(0.0, 100)
    assert age(1.0, 0) < age(1.0, 100) - 2.0
    assert age(2.0, 100) - age(2.0, 0) > age(1.0, 100) - age(1.0, 0)


@pytest.mark.slow
def test_tokens_follow_findings_and_mask():
    conditions = draw_conditions(400)
    latents = F.embedding(codes_of(conditions), CODEBOOK).movedim(-1, 1).contiguous()
    params = Prior(name="tokens", channels=32, blocks=2, dropout=0.0)
    tokens = Tokens.create(latents, None, 0, params, None, CODEBOOK, SPACE)
    train(tokens, latents, conditions, 200)
    wanted = draw_conditions(100, seed=20)
    expected = F.embedding(codes_of(wanted), CODEBOOK).movedim(-1, 1)
    for guidance in (1.0, 2.0):
        tokens.params = params.model_copy(update={"guidance": guidance})
        drawn = tokens.sample(100, None, generator(), wanted)
        assert float((drawn - expected).abs().lt(1e-5).all(1).float().mean()) > 0.95
    mixed = tokens.sample(100, None, generator())
    assert float((mixed - expected).abs().lt(1e-5).all(1).float().mean()) < 0.6


def test_a_stored_prior_keeps_its_conditions(untrained, tmp_path):
    flow = untrained
    save_prior(tmp_path, flow, "0" * 64)
    again = load_prior(tmp_path, "0" * 64)
    wanted = draw_conditions(8)
    assert again.space == SPACE
    assert torch.equal(again.sample(8, None, generator(), wanted), flow.sample(8, None, generator(), wanted))


@pytest.mark.parametrize("conditional", [True, False])
def test_a_prior_without_conditions_has_the_files_of_earlier_versions(conditional):
    params = Prior(name="flow", channels=8, blocks=1, conditional=conditional)
    latents, labels = torch.randn(40, 4, 4, 4, generator=generator()), torch.arange(40) % 2
    plain = Flow.create(latents, labels, 2, params)
    space = None if conditional else SPACE
    tensors, meta = Flow.create(latents, labels, 2, params, None, None, space).state()
    assert "conditions" not in meta
    assert all(torch.equal(tensors[name], value) for name, value in plain.state()[0].items())
    assert not any("values" in name for name in tensors)


@pytest.mark.parametrize("shape", [(7,), (2, 5, 7), (4, 1, 1)])
def test_latents_of_any_shape_take_all_conditions(shape):
    latents = torch.randn(30, *shape, generator=generator())
    params = Prior(name="flow", channels=8, blocks=1, sampling_steps=2)
    flow = Flow.create(latents, None, 0, params, None, None, SPACE)
    conditions = draw_conditions(30)
    assert flow.loss(latents, torch.full((30,), -1), generator(), conditions).isfinite()
    for parameter in flow.network.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator(1))
    drawn = flow.sample(30, None, generator(), conditions)
    assert drawn.shape == latents.shape
    for changed in (
        Conditions(conditions.values * 0.5, conditions.maps),
        Conditions(conditions.values, conditions.maps.flip(-1)),
    ):
        assert not torch.equal(flow.sample(30, None, generator(), changed), drawn)


def test_a_mask_may_be_the_only_condition():
    space = ConditionSpace.from_rows(Preprocess(conditions={"mask": {"kind": "mask"}}), [{}])
    latents, mask = torch.randn(30, 4, 4, 4, generator=generator()), draw_conditions(30).maps
    flow = Flow.create(latents, None, 0, Prior(name="flow", channels=8, blocks=1, sampling_steps=2), None, None, space)
    conditions = Conditions(torch.zeros(30, 0), mask)
    assert flow.loss(latents, torch.full((30,), -1), generator(), conditions).isfinite()
    one = find_conditions("mask=left", space, flow, MODEL, half)
    assert one.values.shape == (1, 0) and one.maps.shape == (1, 2, 16, 16)
    assert flow.sample(3, None, generator(), one.expand(3)).shape == (3, 4, 4, 4)


@pytest.mark.parametrize("name", ["flow", "tokens"])
def test_latents_of_volumes_take_all_conditions(name):
    values = draw_conditions(30).values
    mask = torch.randint(0, 2, (30, 1, 8, 16, 16), generator=generator())
    conditions = Conditions(values, encode_map(ConditionField("mask", "mask", channels=2), mask, torch.ones(30)))
    params = Prior(name=name, channels=8, blocks=1, sampling_steps=2)
    if name == "flow":
        latents = torch.randn(30, 2, 2, 4, 4, generator=generator())
        prior = Flow.create(latents, None, 0, params, None, None, SPACE)
        prior.network.leave.weight.data += 0.2
    else:
        codes = torch.randint(0, 6, (30, 2, 4, 4), generator=generator())
        latents = F.embedding(codes, CODEBOOK).movedim(-1, 1).contiguous()
        prior = Tokens.create(latents, None, 0, params, None, CODEBOOK, SPACE)
    drawn = prior.sample(30, None, generator(), conditions)
    assert drawn.shape == latents.shape
    assert not torch.equal(prior.sample(30, None, generator(), Conditions(values, conditions.maps.flip(-1))), drawn)
    assert prior.sample(30, None, generator()).shape == latents.shape, "unknown"
    assert prior.loss(latents, torch.full((30,), -1), generator(), conditions).isfinite()


def test_densities_and_inversions_leave_conditions_unknown(untrained):
    """The uses of a prior besides sampling (docs/uses.md) know no conditions."""
    latents, labels = torch.randn(3, 4, 4, 4, generator=generator()), torch.full((3,), -1)
    assert untrained.log_density(latents, labels, generator()).isfinite().all()
    again = untrained.transport(untrained.invert(latents, labels), labels)
    assert torch.allclose(again, latents, atol=1e-2)


def make_refiner(space=SPACE):
    params = RefinerParams(enabled=True, channels=8, blocks=1, sampling_steps=2)
    scales = torch.full((1,), 0.2), torch.ones(1, 16, 9), torch.ones(4, 4, 4)
    refiner = Refiner.create(params, (1, 16, 16), 0, *scales, space)
    for parameter in refiner.network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator(2))
    return refiner


def test_a_refiner_takes_conditions_and_keeps_them(tmp_path):
    refiner, conditions = make_refiner(), draw_conditions(6)
    decoded, levels = torch.rand(6, 1, 16, 16, generator=generator()), torch.zeros(6)

    def refine(wanted, by=refiner):
        return by.refine(decoded, levels, None, generator(), wanted)

    assert torch.equal(refine(None), refine(conditions.cleared()))
    assert not torch.equal(refine(None), refine(conditions))
    assert not torch.equal(refine(Conditions(conditions.values, conditions.maps.flip(-1))), refine(conditions))
    refiner.params = refiner.params.model_copy(update={"guidance": 0.0})
    assert torch.allclose(refine(None), refine(conditions), atol=1e-6)
    save_refiner(tmp_path, refiner, "0" * 64)
    loaded = load_refiner(tmp_path, "0" * 64)
    assert loaded is not None and loaded.space == SPACE
    assert torch.equal(refine(conditions, loaded), refine(conditions))
    loss = refiner.loss(refiner.network, decoded, decoded * 0.9, levels, torch.full((6,), -1), generator(), conditions)
    loss.backward()
    assert bool(refiner.network.condition.values[0].weight.grad.any())


@pytest.mark.parametrize(
    ("text", "space", "prior", "message"),
    [
        ("age=3", None, None, "trained without conditions"),
        ("age=3", SPACE, Normal((3,), torch.empty(0)), "neither prior 'normal' nor the model depends on conditions"),
        ("view=AP", SPACE, None, "unknown name 'view'; Known: findings, mask, age"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(untrained, text, space, prior, message):
    with pytest.raises(UserError, match=message):
        find_conditions(text, space, prior or untrained, MODEL, half)


def test_each_map_of_a_request_has_its_channels_and_the_others_are_unknown(untrained):
    kinds = {"edges": {"kind": "image", "folder": "edges"}, **KINDS, "blurred": {"kind": "image", "folder": "blurred"}}
    space = ConditionSpace.from_rows(Preprocess(conditions=kinds), [{"findings": "a+b"}])
    decoder = SimpleNamespace(conditional=False, space=space)

    def read(field, name):
        assert (field.name, name) == ("mask", "left") or (field.name, name) == ("blurred", "grey.png")
        return half(field, name) if name == "left" else np.full((1, 16, 16), 51, np.uint8)

    one = find_conditions("mask=left,blurred=grey.png,age=50", space, Normal((3,), torch.empty(0)), decoder, read)
    means = one.maps.mean((0, 2, 3)).tolist()
    assert means == pytest.approx([0, 0, 1, 0.5, 1, 0.2]), "known and value of edges, mask and blurred"
    only = find_conditions("age=50", space, untrained, decoder, read)
    assert only.maps.shape == (1, 6, 1, 1) and not only.maps.any()


def test_no_request_is_no_condition(untrained):
    assert find_conditions("", SPACE, untrained, MODEL, half) is None
    assert find_conditions({}, None, untrained, MODEL, half) is None
