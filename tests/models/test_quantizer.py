"""The codebook of a VQ-VAE, step by step against slow formulas (van den Oord et al. 2017)."""

import pytest
import torch

from medgen.config import Model
from medgen.models import build_model
from medgen.models.vqvae import DEAD_BELOW, EMA_DECAY, REVIVED_AT, Quantizer

KINDS = ["ema", "gradient", "cosine"]


def quantizer(kind="ema", num_codes=6, channels=3):
    torch.manual_seed(0)
    return Quantizer(num_codes, channels, kind)


def model_of(kind):
    torch.manual_seed(0)
    return build_model(
        Model(name="vqvae", base_channels=4, num_codes=8, latent_channels=3, latent_size=4, codebook=kind),
        (1, 16, 16),
        0,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_vector_gets_its_nearest_code(kind, monkeypatch):
    monkeypatch.setattr("medgen.models.vqvae.MAX_COMPARED", 7)  # in several parts
    found, vectors = quantizer(kind), torch.randn(2, 3, 4, 4)
    codes, nearest = found(vectors)
    for b in range(2):
        for y in range(4):
            for x in range(4):
                vector = vectors[b, :, y, x]
                if kind == "cosine":
                    likeness = [torch.cosine_similarity(vector, code, dim=0).item() for code in found.codebook]
                    expected = max(range(6), key=likeness.__getitem__)
                    code = found.codebook[expected] / found.codebook[expected].norm()
                else:
                    distances = [(vector - code).square().sum().item() for code in found.codebook]
                    expected = min(range(6), key=distances.__getitem__)
                    code = found.codebook[expected]
                assert codes[b, y, x] == expected
                torch.testing.assert_close(nearest[b, :, y, x], code)
    assert torch.equal(found.look_up(codes), nearest)


def test_codes_are_compared_in_float32_whatever_the_network_computes_in():
    """These two differ by less than bfloat16 can tell."""
    found = quantizer(num_codes=2, channels=1)
    found.codebook.copy_(torch.tensor([[1.0], [1.001]]))
    with torch.autocast("cpu", torch.bfloat16):
        codes, nearest = found(torch.tensor([1.0, 1.001]).view(2, 1, 1, 1))
    assert codes.flatten().tolist() == [0, 1]
    assert nearest.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_passes_straight_through(kind):
    """What the decoder says of a code reaches the encoder's vector as it is; the codebook hears nothing of it."""
    model = model_of(kind).train()
    image = torch.rand(2, 1, 16, 16)
    model(image)  # puts the codes on vectors: the next pass is an ordinary one
    seen = {}
    vectors_of = model._vectors
    model._vectors = lambda image: seen.setdefault("vectors", vectors_of(image).detach().requires_grad_())
    decode = model._decode

    def spy(value):
        seen["value"] = value
        value.retain_grad()
        return decode(value)

    model._decode = spy
    output = model(image)
    torch.testing.assert_close(output.latent.value, output.latent.mean)  # the decoder was given codes
    output.reconstruction.square().sum().backward()
    assert seen["value"].grad.abs().sum() > 0
    assert torch.equal(seen["vectors"].grad, seen["value"].grad)
    assert kind == "ema" or model.quantizer.codebook.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_terms_are_the_papers_each_with_its_own_gradient(kind):
    model = model_of(kind).train()
    image = torch.rand(2, 1, 16, 16)
    model(image)
    output = model(image)
    assert output.terms.keys() == ({"commitment"} if kind == "ema" else {"commitment", "codebook"})
    encoder = next(model.encoder.parameters())
    output.terms["commitment"].backward(retain_graph=True)
    assert encoder.grad.abs().sum() > 0
    if kind != "ema":
        assert model.quantizer.codebook.grad is None
        encoder.grad = None
        output.terms["codebook"].backward()
        assert encoder.grad is None
        assert model.quantizer.codebook.grad.abs().sum() > 0
        assert output.terms["codebook"].item() == pytest.approx(output.terms["commitment"].item())
    model.eval()
    vectors, nearest = model._vectors(image), model.encode(image).mean
    slow = sum((a - b) ** 2 for a, b in zip(vectors.flatten().tolist(), nearest.flatten().tolist(), strict=True))
    assert model(image).terms["commitment"].item() == pytest.approx(slow / vectors.numel(), rel=1e-4)


def test_cosine_has_vectors_and_codes_on_the_unit_sphere():
    model = model_of("cosine").eval()
    image = torch.rand(2, 1, 16, 16)
    for found in (model._vectors(image), model.encode(image).mean):
        torch.testing.assert_close(found.norm(dim=1), torch.ones(2, 4, 4))


def test_moving_averages_are_appendix_a1():
    """N_i and m_i of eq. 6 to 8, code by code; ours are in shares of an even use."""
    found = quantizer()
    counts, sums = torch.ones(6), found.codebook.clone()
    found.usage.copy_(counts), found.sums.copy_(sums)
    for _ in range(5):
        vectors = torch.randn(2, 3, 4, 4)
        codes, _ = found(vectors)
        found.follow(vectors, codes)
        for i in range(6):
            mine = vectors.movedim(1, -1)[codes == i]
            even = codes.numel() / 6
            counts[i] = EMA_DECAY * counts[i] + (1 - EMA_DECAY) * len(mine) / even
            sums[i] = EMA_DECAY * sums[i] + (1 - EMA_DECAY) * mine.sum(0) / even
    torch.testing.assert_close(found.usage, counts)
    torch.testing.assert_close(found.codebook, sums / counts[:, None])


@pytest.mark.parametrize("kind", ["gradient", "cosine"])
def test_codes_that_learn_by_gradient_do_not_follow(kind):
    found, vectors = quantizer(kind), torch.randn(2, 3, 4, 4)
    before = found.codebook.detach().clone()
    found.follow(vectors, found(vectors)[0])
    assert torch.equal(found.codebook, before)


@pytest.mark.parametrize("kind", KINDS)
def test_only_dead_codes_are_put_on_vectors_of_the_batch(kind):
    found = quantizer(kind)
    vectors = found.place(torch.randn(2, 3, 4, 4))
    pool = {tuple(vector) for vector in vectors.movedim(1, -1).reshape(-1, 3).tolist()}
    found.revive(vectors)
    assert {tuple(code) for code in found.codebook.tolist()} <= pool  # the first step: no code was ever used
    assert torch.equal(found.usage, torch.full((6,), REVIVED_AT))
    found.usage[2] = DEAD_BELOW / 2
    before = found.codebook.detach().clone()
    later = found.place(torch.randn(2, 3, 4, 4))
    found.revive(later)
    assert torch.equal(found.codebook[[0, 1, 3, 4, 5]], before[[0, 1, 3, 4, 5]])
    assert tuple(found.codebook[2].tolist()) in {tuple(v) for v in later.movedim(1, -1).reshape(-1, 3).tolist()}


def test_a_code_that_nobody_uses_comes_back_within_a_few_hundred_steps():
    found = quantizer()
    vectors = torch.randn(2, 3, 4, 4)
    found.revive(vectors)
    with torch.no_grad():
        found.sums[1] = found.codebook[1] = 1e3
    for _ in range(400):
        found.revive(vectors)
        found.follow(vectors, found(vectors)[0])
    assert found.codebook.abs().max() < 10


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_leaves_the_codebook(bad):
    found, good = quantizer(), torch.randn(2, 3, 4, 4)
    found.revive(good)
    found.follow(good, found(good)[0])
    before = {name: value.clone() for name, value in found.state_dict().items()}
    vectors = torch.full((2, 3, 4, 4), bad)
    found.usage[0] = before["usage"][0] = 0.0  # dead, and yet not put on what is no number
    found.revive(vectors)
    found.follow(vectors, torch.zeros(2, 4, 4, dtype=torch.int64))
    assert all(torch.equal(value, before[name]) for name, value in found.state_dict().items())


def test_the_codebook_rests_outside_training():
    model = model_of("ema").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.rand(2, 1, 16, 16)), model.reconstruct(torch.rand(2, 1, 16, 16))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_starts_from_codes_however_it_is_asked(kind):
    model = model_of(kind).eval()
    latent = model.encode(torch.rand(2, 1, 16, 16))
    expected = model.decode(model.codes[latent.codes].movedim(-1, 1))
    torch.testing.assert_close(model.decode(latent.mean), expected)
    torch.testing.assert_close(model.decode(latent.mean + 1e-4), expected)  # such as a prior's draw
