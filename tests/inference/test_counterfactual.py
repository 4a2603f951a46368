"""An image with another label: by a conditional model, and by a flow followed back and forth."""

from typing import Any

import pytest
import torch

from medgen.config import Model, Prior
from medgen.errors import UserError
from medgen.inference.counterfactual import change_label
from medgen.models import GenerativeModel, build_model
from medgen.priors.flow import Flow


def test_a_conditional_model_decodes_with_the_other_label(linear: Any) -> None:
    torch.manual_seed(0)
    model = build_model(Model(name="cvae", base_channels=8, latent_channels=4), (1, 32, 32), 3).eval()
    assert isinstance(model, GenerativeModel)
    own, other = torch.tensor([0, 1]), torch.tensor([2, 2])
    changed = change_label(model, linear.prior, linear.test[:2], own, other)
    with torch.no_grad():
        latent = model.encode(linear.test[:2], own).mean
        torch.testing.assert_close(changed, model.decode(latent, other))
        same = change_label(model, linear.prior, linear.test[:2], own, own)
        torch.testing.assert_close(same, model.reconstruct(linear.test[:2], own))


def test_a_flow_moves_latents_from_class_to_class(linear: Any) -> None:
    """An untrained flow is one Gaussian for each class, so the change is the difference of the centres."""
    labels = torch.arange(len(linear.train)) % 2
    with torch.no_grad():
        latents = linear.model.encode(linear.train).mean + 2.0 * labels[:, None]
    flow = Flow.create(latents, labels, 2, Prior(name="flow", channels=8, blocks=1))
    own, other = torch.tensor([0, 1]), torch.tensor([1, 0])
    changed = change_label(linear.model, flow, linear.test[:2], own, other)
    with torch.no_grad():
        rebuilt = linear.model.reconstruct(linear.test[:2])
        torch.testing.assert_close(change_label(linear.model, flow, linear.test[:2], own, own), rebuilt)
        shift = flow.path.scale * (flow.path.centres[2] - flow.path.centres[1])
        moved = linear.model.encode(linear.test[:2]).mean + torch.stack([shift, -shift])
        torch.testing.assert_close(changed, linear.model.decode(moved), atol=1e-5, rtol=1e-4)
    assert (changed - rebuilt).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["gaussian", "flow"])
def test_models_and_priors_that_cannot_are_refused_with_those_that_can(linear: Any, kind: str) -> None:
    labels, params = torch.arange(len(linear.train)) % 2, Prior(name="flow", channels=8, blocks=1, conditional=False)
    with torch.no_grad():
        latents = linear.model.encode(linear.train).mean
    prior: Any = Flow.create(latents, labels, 2, params) if kind == "flow" else linear.prior
    label = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(UserError, match=r"counterfactual: .*cvae.*prior\.name=flow"):
        change_label(linear.model, prior, linear.test[:1], label, label + 1)
