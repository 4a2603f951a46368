"""The tokens prior: training, sampling, storage and refused inputs."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medgen.config import Prior
from medgen.errors import UserError
from medgen.nn.quantizer import nearest_codes
from medgen.priors import load_prior, save_prior
from medgen.priors.tokens import Tokens, draw_codes, draw_mask, masked_after

SIDE, NUM_CODES = 3, 5
NUM_CLASSES, NUM_VARIANTS = 3, 2
CODEBOOK = torch.randn(NUM_CODES, 4, generator=torch.Generator().manual_seed(9))
# each class has two equally frequent grids; some codes identify the grid
PATTERNS = torch.randint(
    NUM_CODES, (NUM_CLASSES, NUM_VARIANTS, SIDE * SIDE), generator=torch.Generator().manual_seed(9)
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def embed(codes):
    """Codes (N, ...) of 9 positions -> latents (N, 4, 3, 3)."""
    return F.embedding(codes.view(-1, SIDE, SIDE), CODEBOOK).movedim(-1, 1).contiguous()


def make(n=300):
    labels = torch.arange(n) % NUM_CLASSES
    return embed(PATTERNS[labels, torch.randint(NUM_VARIANTS, (n,), generator=generator(1))]), labels


def create(labels="given", num_classes=3, codebook=CODEBOOK, **params):
    latents, given = make()
    settings = {"channels": 64, "blocks": 2, "dropout": 0.0} | params
    labels = given if isinstance(labels, str) else labels
    return Tokens.create(latents, labels, num_classes, Prior(name="tokens", **settings), None, codebook)


@pytest.fixture(scope="module")
def trained():
    """A prior trained on the patterns."""
    prior, (latents, labels), source, steps = create(), make(), generator(), 350
    optimizer = torch.optim.AdamW(prior.network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        rows = torch.randint(len(latents), (64,), generator=source)
        optimizer.zero_grad()
        prior.loss(latents[rows], labels[rows], source).backward()
        optimizer.step()
        schedule.step()
    return prior


class Truth(nn.Module):
    """Replaces the network by the exact probabilities of masked codes under the patterns."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, codes, label):
        known = PATTERNS.flatten(0, 1)
        owner = torch.arange(len(known)) // NUM_VARIANTS
        matches = ((codes[:, None] == known) | (codes[:, None] == NUM_CODES)).all(-1)  # (B, patterns)
        matches &= (label[:, None] == owner) | (label[:, None] < 0)
        counts = torch.einsum("bk,kpc->bpc", matches.float(), F.one_hot(known, NUM_CODES).float())
        return (counts / matches.sum(1)[:, None, None]).log()


def with_params(prior, **params):
    tensors, meta = prior.state()
    return Tokens.restore(tensors, meta | {"prior": meta["prior"] | params})


def patterns_drawn(prior, labels):
    """Class and variant of each draw, (N,) and (N,); -1 if the grid is not a pattern."""
    codes = nearest_codes(prior.sample(len(labels), labels, generator(3)), CODEBOOK).flatten(1)
    same = (codes[:, None] == PATTERNS.flatten(0, 1)).all(-1)  # (N, classes · variants)
    number = torch.where(same.any(1), same.long().argmax(1), -1)
    return number.div(NUM_VARIANTS, rounding_mode="floor"), number % NUM_VARIANTS


def test_each_class_gets_all_of_its_own_patterns(trained):
    labels = torch.arange(NUM_CLASSES).repeat(100)
    found, variants = patterns_drawn(trained, labels)
    assert (found == labels).float().mean() >= 0.9
    for label in range(NUM_CLASSES):
        share = torch.bincount(variants[found == label], minlength=NUM_VARIANTS) / 100
        assert share.min() > 0.3


@pytest.mark.parametrize("label", [-1, 1])
def test_one_position_a_step_draws_exactly_the_networks_distribution(label):
    prior = create()
    prior.network = Truth()
    found, variants = patterns_drawn(prior, torch.full((600,), label))
    share = torch.bincount(found * NUM_VARIANTS + variants, minlength=NUM_CLASSES * NUM_VARIANTS) / 600
    expected = torch.full((NUM_CLASSES, NUM_VARIANTS), 1 / 6)
    if label >= 0:
        expected = torch.zeros_like(expected).index_fill(0, torch.tensor(label), 1 / 2)
    assert (found >= 0).all()
    torch.testing.assert_close(share, expected.flatten(), atol=0.06, rtol=0)


def test_samples_without_a_label_follow_the_train_mix(trained):
    found, _ = patterns_drawn(trained, torch.full((300,), -1))
    share = torch.bincount(found[found >= 0], minlength=NUM_CLASSES) / (found >= 0).sum()
    assert (found >= 0).float().mean() > 0.2  # only a tenth of the few steps had no label; chance is 6 / 5⁹
    assert share.min() > 0.2


def test_guidance_0_ignores_the_class_and_2_keeps_the_patterns(trained):
    labels = torch.full((300,), 1)
    unconditional = with_params(trained, guidance=0.0).sample(300, labels, generator())
    assert torch.equal(unconditional, trained.sample(300, None, generator()))
    assert not torch.equal(unconditional, trained.sample(300, labels, generator()))
    found, _ = patterns_drawn(with_params(trained, guidance=2.0), labels)
    assert (found == 1).float().mean() >= 0.9


def test_the_loss_falls_from_a_uniform_guess_to_near_its_minimum(trained):
    latents, labels = make()
    with torch.no_grad():
        assert float(create().loss(latents, labels, generator())) == pytest.approx(math.log(NUM_CODES), abs=0.1)
        exact = create()
        exact.network = Truth()
        minimum = float(exact.loss(latents, labels, generator()))
        assert minimum <= float(trained.loss(latents, labels, generator())) < minimum + 0.1


@torch.no_grad()
def test_loss_is_the_mean_negative_log_probability_of_masked_codes(trained):
    latents, labels = make(8)
    source = generator(5)
    masked = draw_mask(8, SIDE * SIDE, source)
    dropped = torch.rand(8, generator=source) < 0.1
    losses = []
    for row in range(8):
        distances = [[float((v - code).norm()) for code in CODEBOOK] for v in latents[row].flatten(1).T]
        truth = [distance.index(min(distance)) for distance in distances]
        seen = torch.tensor([NUM_CODES if masked[row, i] else truth[i] for i in range(SIDE * SIDE)])
        label = -1 if dropped[row] else int(labels[row])
        logits = trained.network(seen[None], torch.tensor([label]))[0].double()
        for i in range(SIDE * SIDE):
            if masked[row, i]:
                losses.append(-math.log(math.exp(logits[i, truth[i]]) / float(logits[i].exp().sum())))
    assert float(trained.loss(latents, labels, generator(5))) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_the_share_of_masked_positions_follows_the_cosine():
    share = draw_mask(4000, 64, generator()).float().mean(1)
    assert share.min() >= 1 / 64
    # cos(π r / 2), r uniform: its mean is 2 / π, its median cos(π / 4); rounding up adds half a position
    assert float(share.mean()) == pytest.approx(2 / math.pi + 0.5 / 64, abs=0.02)
    assert float(share.median()) == pytest.approx(math.cos(math.pi / 4), abs=0.03)
    per_position = draw_mask(4000, 64, generator()).float().mean(0)
    assert per_position.std() < 0.015


def test_codes_are_drawn_with_their_probability():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    uniform = torch.rand(1, 20_000, generator=generator())
    uniform[0, :2] = torch.tensor([0.0, 1.0 - 2**-24])
    drawn = draw_codes(probabilities.expand(1, 20_000, -1), uniform)
    share = torch.bincount(drawn[0], minlength=6) / 20_000
    torch.testing.assert_close(share, probabilities, atol=0.015, rtol=0)
    assert not share[probabilities == 0].any()


@pytest.mark.parametrize(("positions", "steps"), [(1, 10), (9, 1), (9, 9), (9, 50), (64, 10), (256, 8), (256, 255)])
def test_every_step_decodes_at_least_one_code_and_the_last_all(positions, steps):
    counts = masked_after(positions, steps)
    assert len(counts) == min(positions, steps)
    assert counts[-1] == 0
    assert all(before > after for before, after in zip([positions, *counts], counts, strict=False))
    if (positions, steps) == (256, 8):
        assert counts == [math.floor(256 * math.cos(math.pi / 2 * t / 8)) for t in range(1, 8)] + [0]


@pytest.mark.parametrize("steps", [None, 1, 4, 100])
def test_all_positions_get_codes_for_any_number_of_steps(trained, steps):
    trained.network.train()
    prior = with_params(trained, sampling_steps=steps)
    prior.network.train()
    drawn = prior.sample(7, torch.tensor([0, 1, 2, -1, 0, 1, 2]), generator())
    assert prior.network.training
    assert drawn.shape == (7, 4, SIDE, SIDE)
    assert drawn.dtype == torch.float32
    assert not drawn.requires_grad
    assert torch.equal(drawn, embed(nearest_codes(drawn, CODEBOOK)))


def test_samples_follow_the_seed_and_parts_of_a_large_draw_differ(trained, monkeypatch):
    first = trained.sample(6, None, generator(1))
    assert torch.equal(first, trained.sample(6, None, generator(1)))
    assert not torch.equal(first, trained.sample(6, None, generator(2)))
    monkeypatch.setattr("medgen.priors.tokens._MAX_LOGITS", 3 * SIDE * SIDE * NUM_CODES)
    parts = trained.sample(6, None, generator(1))
    assert not torch.equal(parts[:3], parts[3:])


def test_the_network_follows_the_seed_and_leaves_the_global_generator():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other = create(), create(), create(seed=1)
    assert torch.equal(before, torch.get_rng_state())
    for name, weight in first.network.state_dict().items():
        assert torch.equal(weight, again.network.state_dict()[name])
    assert not torch.equal(first.network.code.weight, other.network.code.weight)


def test_a_saved_prior_loads_unchanged_and_saving_is_deterministic(trained, tmp_path):
    save_prior(tmp_path / "a", trained, "m")
    loaded = load_prior(tmp_path / "a", "m")
    save_prior(tmp_path / "b", loaded, "m")
    labels = torch.tensor([0, 1, 2, 2])
    assert torch.equal(loaded.sample(4, labels, generator()), trained.sample(4, labels, generator()))
    assert loaded.conditional
    assert loaded.latent_shape == (4, SIDE, SIDE)
    for file in ("prior.safetensors", "prior.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert json.loads((tmp_path / "a" / "prior.json").read_text())["name"] == "tokens"


@pytest.mark.parametrize(
    ("labels", "params", "num_frequencies"),
    [(None, {}, 0), (torch.full((300,), -1), {}, 0), ("given", {"conditional": False}, 3)],
    ids=["no labels", "unlabelled", "not conditional"],
)
def test_a_prior_without_classes_ignores_labels(labels, params, num_frequencies):
    prior = create(labels, **params)
    assert not prior.conditional
    assert len(prior.frequencies) == num_frequencies
    drawn = prior.sample(5, torch.zeros(5, dtype=torch.int64), generator())
    assert torch.equal(drawn, prior.sample(5, None, generator()))
    latents, given = make()
    unlabelled = torch.full_like(given, -1)
    assert torch.equal(prior.loss(latents, given, generator()), prior.loss(latents, unlabelled, generator()))


def test_a_class_without_training_images_is_refused():
    with pytest.raises(ValueError, match=r"found \[3\], expected classes with training images: \[0, 1, 2\]"):
        create(num_classes=4).sample(2, torch.tensor([0, 3]), generator())


@pytest.mark.parametrize(
    ("latents", "codebook", "message"),
    [
        (make()[0], None, "prior.name: tokens needs a model with a codebook .* gmm or flow"),
        (make()[0], CODEBOOK + 1.0, "made of the model's codes, found others of shape .4, 3, 3.; .* gmm or flow"),
        (torch.randn(20, 4), CODEBOOK, "made of the model's codes, found others of shape .4,."),
        (make()[0][:1].repeat(9, 1, 1, 1), CODEBOOK, "the latents of 9 training images do not vary"),
        (torch.full((9, 4, 3, 3), torch.nan), CODEBOOK, "NaN"),
    ],
    ids=["no codebook", "another codebook", "flat", "all alike", "not finite"],
)
def test_latents_not_made_of_codes_are_refused(latents, codebook, message):
    with pytest.raises(UserError, match=message):
        Tokens.create(latents, None, 0, Prior(name="tokens"), None, codebook)


def test_a_wrong_code_is_improbable_given_the_others(trained):
    codes = PATTERNS[1, 0].view(1, SIDE, SIDE).clone()
    right = trained.log_likelihood_map(codes, torch.tensor([1]))
    codes[0, 1, 2] = (codes[0, 1, 2] + 1) % NUM_CODES
    wrong = trained.log_likelihood_map(codes, torch.tensor([1]))
    assert right.exp().min() > 0.3
    assert int(wrong.argmin()) == 1 * SIDE + 2 and wrong.min().exp() < 0.05


def test_each_code_is_predicted_without_itself_and_its_group(trained):
    codes, labels = PATTERNS[:, 1].view(-1, SIDE, SIDE), torch.arange(NUM_CLASSES)
    found = trained.log_likelihood_map(codes, labels)
    for row in range(SIDE):
        for column in range(SIDE):
            masked = torch.tensor(
                [[(3 * r + c) % 8 == (3 * row + column) % 8 for c in range(SIDE)] for r in range(SIDE)]
            )
            with torch.no_grad():
                logits = trained.network(codes.masked_fill(masked, NUM_CODES).flatten(1), labels)
            expected = logits[:, row * SIDE + column].log_softmax(-1).gather(-1, codes[:, row, column, None])
            torch.testing.assert_close(found[:, row, column], expected[:, 0])


def test_grids_of_volumes_are_drawn():
    """Positions of a slice, row and column differ; every draw is made of codes."""
    codes = torch.randint(NUM_CODES, (40, 2, 3, 4), generator=generator())
    latents = F.embedding(codes, CODEBOOK).movedim(-1, 1).contiguous()
    prior = Tokens.create(latents, None, 0, Prior(name="tokens", channels=32, blocks=1), None, CODEBOOK)
    assert bool(torch.isfinite(prior.loss(latents, torch.full((40,), -1), generator())))
    drawn = prior.sample(5, None, generator())
    assert drawn.shape == (5, 4, 2, 3, 4)
    assert torch.equal(F.embedding(nearest_codes(drawn, CODEBOOK), CODEBOOK).movedim(-1, 1), drawn)
    again = Tokens.restore(*prior.state())
    assert torch.equal(again.sample(5, None, generator()), drawn)
    shares = prior.log_likelihood_map(codes[:2], torch.full((2,), -1))
    assert shares.shape == (2, 2, 3, 4) and bool((shares < 0).all())
    logits = prior.network.eval()(torch.zeros(1, 24, dtype=torch.int64), torch.tensor([-1]))[0]
    assert len(torch.unique(logits, dim=0)) == 24
