"""The codebook of a VQ-VAE, compared with slow formulas (van den Oord et al. 2017)."""

import pytest
import torch

from medgen.config import Model
from medgen.models import build_model
from medgen.nn.quantizer import DEAD_USAGE, EMA_DECAY, RESTART_USAGE, Quantizer

KINDS = ["ema", "gradient", "cosine"]


def make_quantizer(kind="ema", num_embeddings=6, channels=3):
    torch.manual_seed(0)
    return Quantizer(num_embeddings, channels, kind)


def make_model(kind):
    torch.manual_seed(0)
    return build_model(
        Model(name="vqvae", base_channels=4, num_embeddings=8, latent_channels=3, latent_size=4, codebook=kind),
        (1, 16, 16),
        0,
    )


def rows(vectors):
    """The vectors (B, Z, h, w) as a set of tuples."""
    return {tuple(vector) for vector in vectors.movedim(1, -1).flatten(0, 2).tolist()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_vector_gets_its_nearest_code(kind, monkeypatch):
    monkeypatch.setattr("medgen.nn.quantizer.MAX_DISTANCES", 7 * 6)  # in several parts
    quantizer, vectors = make_quantizer(kind), torch.randn(2, 3, 4, 4)
    codes, nearest = quantizer(vectors)
    for b in range(2):
        for y in range(4):
            for x in range(4):
                vector = vectors[b, :, y, x]
                if kind == "cosine":
                    scores = [torch.cosine_similarity(vector, code, dim=0).item() for code in quantizer.codebook]
                    expected = max(range(6), key=scores.__getitem__)
                    code = quantizer.codebook[expected] / quantizer.codebook[expected].norm()
                else:
                    distances = [(vector - code).square().sum().item() for code in quantizer.codebook]
                    expected = min(range(6), key=distances.__getitem__)
                    code = quantizer.codebook[expected]
                assert codes[b, y, x] == expected
                torch.testing.assert_close(nearest[b, :, y, x], code)
    assert torch.equal(quantizer.embed(codes), nearest)


def test_codes_are_compared_in_float32_under_autocast():
    """The two vectors are equal in bfloat16."""
    quantizer = make_quantizer(num_embeddings=2, channels=1)
    quantizer.codebook.copy_(torch.tensor([[1.0], [1.001]]))
    with torch.autocast("cpu", torch.bfloat16):
        codes, nearest = quantizer(torch.tensor([1.0, 1.001]).view(2, 1, 1, 1))
    assert codes.flatten().tolist() == [0, 1]
    assert nearest.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_passes_straight_through(kind):
    """The decoder's gradient reaches the encoder's vector unchanged and does not reach the codebook."""
    model = make_model(kind).train()
    image = torch.rand(2, 1, 16, 16)
    model(image)  # moves the codes to vectors, so that the next pass is an ordinary one
    seen = {}
    encode, decode = model._encode_vectors, model._decode_vectors
    model._encode_vectors = lambda image: seen.setdefault("vectors", encode(image).detach().requires_grad_())

    def spy(value):
        seen["value"] = value
        value.retain_grad()
        return decode(value)

    model._decode_vectors = spy
    output = model(image)
    torch.testing.assert_close(output.latent.value, output.latent.mean)  # the decoder's input are codes
    output.prediction.square().sum().backward()
    assert seen["value"].grad.abs().sum() > 0
    assert torch.equal(seen["vectors"].grad, seen["value"].grad)
    assert kind == "ema" or model.quantizer.codebook.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_each_term_of_the_paper_has_its_own_gradient(kind):
    model = make_model(kind).train()
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
    vectors, nearest = model._encode_vectors(image), model.encode(image).mean
    slow = sum((a - b) ** 2 for a, b in zip(vectors.flatten().tolist(), nearest.flatten().tolist(), strict=True))
    assert model(image).terms["commitment"].item() == pytest.approx(slow / vectors.numel(), rel=1e-4)


def test_cosine_has_vectors_and_codes_on_the_unit_sphere():
    model = make_model("cosine").eval()
    image = torch.rand(2, 1, 16, 16)
    for vectors in (model._encode_vectors(image), model.encode(image).mean):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2, 4, 4))


def test_moving_averages_follow_appendix_a1():
    """N_i and m_i of eq. 6 to 8, code by code, in shares of an even use."""
    quantizer = make_quantizer()
    counts, sums = torch.ones(6), quantizer.codebook.clone()
    quantizer.usage.copy_(counts), quantizer.sums.copy_(sums)
    for _ in range(5):
        vectors = torch.randn(2, 3, 4, 4)
        codes, _ = quantizer(vectors)
        quantizer.update_ema(vectors, codes)
        for i in range(6):
            own = vectors.movedim(1, -1)[codes == i]
            even = codes.numel() / 6
            counts[i] = EMA_DECAY * counts[i] + (1 - EMA_DECAY) * len(own) / even
            sums[i] = EMA_DECAY * sums[i] + (1 - EMA_DECAY) * own.sum(0) / even
    torch.testing.assert_close(quantizer.usage, counts)
    torch.testing.assert_close(quantizer.codebook, sums / counts[:, None])


@pytest.mark.parametrize("kind", ["gradient", "cosine"])
def test_moving_averages_do_not_move_codes_that_learn_by_gradient(kind):
    quantizer, vectors = make_quantizer(kind), torch.randn(2, 3, 4, 4)
    before = quantizer.codebook.detach().clone()
    quantizer.update_ema(vectors, quantizer(vectors)[0])
    assert torch.equal(quantizer.codebook, before)


@pytest.mark.parametrize("kind", KINDS)
def test_only_dead_codes_are_restarted_from_the_batch(kind):
    quantizer = make_quantizer(kind)
    vectors = quantizer.project(torch.randn(2, 3, 4, 4))
    quantizer.restart_dead_codes(vectors)
    assert {tuple(code) for code in quantizer.codebook.tolist()} <= rows(vectors)  # at first no code was ever used
    assert torch.equal(quantizer.usage, torch.full((6,), RESTART_USAGE))
    quantizer.usage[2] = DEAD_USAGE / 2
    before = quantizer.codebook.detach().clone()
    later = quantizer.project(torch.randn(2, 3, 4, 4))
    quantizer.restart_dead_codes(later)
    assert torch.equal(quantizer.codebook[[0, 1, 3, 4, 5]], before[[0, 1, 3, 4, 5]])
    assert tuple(quantizer.codebook[2].tolist()) in rows(later)


def test_an_unused_code_is_restarted_within_a_few_hundred_steps():
    quantizer = make_quantizer()
    vectors = torch.randn(2, 3, 4, 4)
    quantizer.restart_dead_codes(vectors)
    with torch.no_grad():
        quantizer.sums[1] = quantizer.codebook[1] = 1e3
    for _ in range(400):
        quantizer.restart_dead_codes(vectors)
        quantizer.update_ema(vectors, quantizer(vectors)[0])
    assert quantizer.codebook.abs().max() < 10


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_leaves_the_codebook_unchanged(bad):
    quantizer, good = make_quantizer(), torch.randn(2, 3, 4, 4)
    quantizer.restart_dead_codes(good)
    quantizer.update_ema(good, quantizer(good)[0])
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    vectors = torch.full((2, 3, 4, 4), bad)
    quantizer.usage[0] = before["usage"][0] = 0.0  # dead, but not moved to a vector that is not finite
    quantizer.restart_dead_codes(vectors)
    quantizer.update_ema(vectors, torch.zeros(2, 4, 4, dtype=torch.int64))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_evaluation_leaves_the_codebook_unchanged():
    model = make_model("ema").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.rand(2, 1, 16, 16)), model.reconstruct(torch.rand(2, 1, 16, 16))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_decode_replaces_latents_by_their_nearest_codes(kind):
    model = make_model(kind).eval()
    latent = model.encode(torch.rand(2, 1, 16, 16))
    expected = model.decode(model.codebook[latent.codes].movedim(-1, 1))
    torch.testing.assert_close(model.decode(latent.mean), expected)
    torch.testing.assert_close(model.decode(latent.mean + 1e-4), expected)  # such as a prior's draw
