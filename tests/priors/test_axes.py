"""Priors of latents that are not in memory: the same fits from chunks, bounded reads, and what is reduced and said."""

import pytest
import torch

from medgen.config import Prior
from medgen.priors import ANALYTIC, NEURAL, gmm
from medgen.priors import axes as axes_module
from medgen.priors.axes import PrincipalAxes

NAMES = [*ANALYTIC, "flow"]


class OnDisk:
    """Latents of which each read is recorded."""

    def __init__(self, latents):
        self._latents, self.shape, self.reads = latents, tuple(latents.shape), []

    def __len__(self):
        return len(self._latents)

    def __getitem__(self, rows):
        found = self._latents[rows]
        self.reads.append(found.numel())
        return found


def make(num=900, shape=(2, 3, 2)):
    generator = torch.Generator().manual_seed(0)
    dim = torch.Size(shape).numel()
    labels = torch.cat([torch.zeros(num - 30), torch.ones(30)]).long()  # the second class is rare
    flat = torch.randn(num, dim, generator=generator) @ torch.randn(dim, dim, generator=generator)
    flat[:, 0] += 60.0 * torch.randint(3, (num,), generator=generator)  # three clusters
    return flat.view(num, *shape), labels


def fit(name, latents, labels, **params):
    family = ANALYTIC[name].fit if name in ANALYTIC else NEURAL[name].create
    settings = {"channels": 8, "blocks": 1} if name in NEURAL else {}
    return family(latents, labels, 2, Prior(name=name, **settings, **params), torch.full(latents.shape[1:], 0.1))


@pytest.mark.parametrize("name", NAMES)
def test_latents_on_disk_give_the_prior_of_latents_in_memory(name, monkeypatch):
    latents, labels = make()
    whole = fit(name, latents, labels)
    monkeypatch.setattr(axes_module, "CHUNK_VALUES", 12 * 64)  # 64 latents
    on_disk = OnDisk(latents)
    parts = fit(name, on_disk, labels)
    tensors, other = whole.state()[0], parts.state()[0]
    assert tensors.keys() == other.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(other[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    assert max(on_disk.reads, default=0) <= 12 * 64


def test_the_axes_of_many_latents_are_numpys(monkeypatch):
    monkeypatch.setattr(axes_module, "CHUNK_VALUES", 12 * 7)
    latents, _ = make()
    found = PrincipalAxes.fit(OnDisk(latents))
    flat = latents.flatten(1).double()
    _, singular, directions = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    torch.testing.assert_close(found.scales, singular / (len(flat) - 1) ** 0.5)
    torch.testing.assert_close((found.directions * directions).sum(1).abs(), torch.ones(12).double())


def test_large_latents_have_the_axes_of_some_and_say_so(monkeypatch, capsys):
    latents, labels = make(200, (10, 10))
    monkeypatch.setattr(axes_module, "MAX_VALUES", 50 * 100)
    monkeypatch.setattr(axes_module, "MAX_SIDE", 60)
    on_disk = OnDisk(latents)
    found = fit("gaussian", on_disk, labels)
    assert len(found.axes.scales) == 49 and max(on_disk.reads) == 50 * 100
    assert "principal axes are fitted to 50 of 200 latents, as many as 100 dimensions allow" in capsys.readouterr().err
    expected = PrincipalAxes.fit(latents[torch.linspace(0, 199, 50).long()])
    torch.testing.assert_close(found.axes.scales, expected.scales.float())


def test_a_mixture_too_large_for_a_file_has_fewer_axes_and_says_so(monkeypatch, capsys):
    latents, labels = make()
    monkeypatch.setattr(gmm, "_MAX_FACTORS", 5 * 16)
    found = fit("gmm", latents, labels, components=(4,), variance_kept=1.0)
    assert found.factors.shape == (5, 4, 4) and found.residual_means.shape == (5, 8)
    assert "covariances of 5 components in 12 axes exceed 80 values; they are reduced to 4 axes" in (
        " ".join(capsys.readouterr().err.split())
    )
    assert torch.isfinite(found.log_likelihood(latents, labels)).all()


def test_clusters_of_many_images_are_found_in_some_and_fitted_to_all(monkeypatch, capsys):
    latents, labels = make()
    whole = fit("gmm", latents, labels, components=(3,), conditional=False)
    monkeypatch.setattr(gmm, "_MAX_CLUSTERED", 300)
    some = fit("gmm", latents, labels, components=(3,), conditional=False)
    assert "clusters are found in 300 of 900 images" in capsys.readouterr().out
    assert some.choices[0]["rows"] == 900
    order, other = whole.centres[:, 0].argsort(), some.centres[:, 0].argsort()
    torch.testing.assert_close(some.centres[other], whole.centres[order], rtol=0.05, atol=0.05)
    torch.testing.assert_close(some.weights[other], whole.weights[order], rtol=0.05, atol=0.02)
