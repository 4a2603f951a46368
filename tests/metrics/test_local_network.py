"""A feature network from a local file: the features agree with torchvision; other files are errors."""

import hashlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save
from torch import Tensor, nn
from torchvision.models import densenet121, resnet18

from medgen.config import Evaluate, LocalNetwork
from medgen.errors import UserError
from medgen.metrics.local_network import load_local_network

SIZE = 32


class Pooled(nn.Module):
    """(B, 3, H, W) -> (B, 6)."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([image.mean(dim=(2, 3)), image.amax(dim=(2, 3))], dim=1)


class Convolved(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image


class Pair(nn.Module):
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return image, image


class Fussy(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.reshape(2, 7)


class Unbounded(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.mean(dim=(2, 3)) / 0.0


def script(module: nn.Module) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


def weights(build: Callable[..., nn.Module] = resnet18, num_classes: int = 3) -> bytes:
    torch.manual_seed(0)
    return save(build(weights=None, num_classes=num_classes).state_dict())


def described(folder: Path, content: bytes, architecture: str, **change: object) -> LocalNetwork:
    (folder / "network").write_bytes(content)
    values = {"path": "network", "sha256": hashlib.sha256(content).hexdigest(), "architecture": architecture}
    return LocalNetwork.model_validate(values | {"image_size": SIZE} | change)


@pytest.mark.parametrize(
    ("build", "architecture", "num_features"), [(resnet18, "resnet18", 512), (densenet121, "densenet121", 1024)]
)
@torch.no_grad()
def test_features_are_the_inputs_of_the_last_layer(
    build: Callable[..., nn.Module], architecture: str, num_features: int, tmp_path: Path
) -> None:
    params = described(tmp_path, weights(build), architecture)
    images = torch.randint(0, 256, (18, 1, SIZE, SIZE), dtype=torch.uint8)
    found = load_local_network(params, tmp_path)(images)
    assert found.shape == (18, num_features)
    torch.manual_seed(0)
    network = build(weights=None, num_classes=3).eval()
    kept = []
    head = network.get_submodule("fc" if architecture == "resnet18" else "classifier")
    head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in (params.mean, params.std))
    network((images.expand(-1, 3, -1, -1) / 255 - mean) / std)
    torch.testing.assert_close(found, kept[0])


def test_images_are_resized_repeated_to_three_channels_and_standardised(tmp_path: Path) -> None:
    params = described(tmp_path, script(Pooled()), "torchscript", mean=(0.0, 0.2, 0.4), std=(1.0, 0.5, 0.25))
    images = torch.full((3, 1, 50, 50), 102, dtype=torch.uint8)
    images[:, :, :25] = 204
    found = load_local_network(params, tmp_path)(images)
    expected = [(0.6 - mean) / std for mean, std in zip(params.mean, params.std, strict=True)]
    torch.testing.assert_close(found[:, :3], torch.tensor([expected] * 3), atol=1e-3, rtol=0)
    assert load_local_network(params, tmp_path)(torch.zeros(2, 3, 40, 60, dtype=torch.uint8)).shape == (2, 6)


def payload(place: Path) -> bytes:
    """A pickle that makes a folder when Python loads it."""
    return f"cos\nmkdir\n(V{place}\ntR.".encode()


@pytest.mark.parametrize(
    ("content", "architecture", "message"),
    [
        (lambda _: weights(), "resnet34", r"tensors missing, such as layer1\.2\.conv1\.weight.*torchvision's resnet34"),
        (lambda _: weights(densenet121), "resnet18", r"tensors missing.*tensors unknown, such as features\."),
        (lambda _: save({"conv1.weight": torch.zeros(64, 1, 7, 7)}), "resnet18", "1 tensors of another shape, such as"),
        (lambda _: b"<html>404</html>", "resnet18", "not readable as safetensors"),
        (lambda _: weights(), "torchscript", "not readable as TorchScript"),
        (payload, "torchscript", "not readable as TorchScript"),
        (payload, "resnet18", "not readable as safetensors"),
        (lambda _: script(Convolved()), "torchscript", r"expected features of shape \(2, D\).*found \(2, 3, 32, 32\)"),
        (lambda _: script(Pair()), "torchscript", "found tuple"),
        (lambda _: script(Fussy()), "torchscript", r"fails on images of shape \(2, 3, 32, 32\): .*invalid for input"),
        (lambda _: script(Unbounded()), "torchscript", "not finite"),
    ],
    ids=[
        "another resnet", "another architecture", "grey weights", "text", "weights as program", "pickle as program",
        "pickle as weights", "a map", "two outputs", "an error", "infinite",
    ],
)  # fmt: skip
def test_any_other_file_is_an_error_and_no_code_in_it_runs(
    content: Callable[[Path], bytes], architecture: str, message: str, tmp_path: Path
) -> None:
    params = described(tmp_path, content(tmp_path / "ran"), architecture)
    with pytest.raises(UserError, match=message) as refusal:
        load_local_network(params, tmp_path)
    assert str(refusal.value).startswith(str(tmp_path / "network"))
    assert not (tmp_path / "ran").exists()


def test_the_hash_is_checked_before_the_file_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = described(tmp_path, script(Pooled()), "torchscript", sha256="0" * 64)
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("loaded"))
    found = hashlib.sha256((tmp_path / "network").read_bytes()).hexdigest()
    with pytest.raises(UserError, match=f"network: SHA-256 is {found}, but evaluate.local.sha256 is {'0' * 64}"):
        load_local_network(params, tmp_path)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    params = described(tmp_path, b"", "torchscript").model_copy(update={"path": "other/network.pt"})
    with pytest.raises(UserError, match=r"other/network\.pt: cannot be read: No such file.*evaluate\.local\.path"):
        load_local_network(params, tmp_path)


def test_the_extractor_local_needs_its_section() -> None:
    with pytest.raises(ValidationError, match=r"no section evaluate\.local"):
        Evaluate(extractors=("domain", "local"))
