"""Features of a network that is loaded from a local file, such as one trained on radiographs.

network = load_local_network(params.evaluate.local, root)
network(images)  # (N, D)

The file has safetensors weights of a torchvision architecture, or a TorchScript program. Its SHA-256 is checked before
it is loaded, and Python unpickles nothing in it.
"""

import hashlib
import io
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F

from medgen.config import LocalNetwork as Params
from medgen.data.images import to_floats
from medgen.errors import UserError

# name of each architecture's last layer, which is replaced by the identity
_HEADS = {"resnet18": "fc", "resnet34": "fc", "resnet50": "fc", "densenet121": "classifier"}
_BATCH_SIZE = 16
_MAX_NAMED = 3  # tensors named in an error message


class LocalNetwork(nn.Module):
    """A feature network for images of any size.

    Grey is repeated to three channels; images are resized (bilinear, antialiased) and standardised by
    evaluate.local.mean and std.
    """

    def __init__(self, network: nn.Module, params: Params, path: Path) -> None:
        super().__init__()
        self.network, self.params, self.path = network, params, path
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(params.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(params.std).view(1, 3, 1, 1))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features (N, D), on the CPU, of images (N, 1 or 3, H, W) as stored.

        Raises:
            UserError: the network fails on the images, or does not return one finite vector for each.
        """
        return torch.cat([self._features(part) for part in torch.split(images, _BATCH_SIZE)])

    def _features(self, images: Tensor) -> Tensor:
        side = self.params.image_size
        values = to_floats(images.to(self.mean.device)).expand(-1, 3, -1, -1)
        values = F.interpolate(values, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
        try:
            features = self.network((values - self.mean) / self.std)
        except RuntimeError as error:  # includes TorchScript's errors; the last line names the cause
            reason = str(error).strip().rpartition("\n")[2]
            raise UserError(f"{self.path}: fails on images of shape {tuple(values.shape)}: {reason}") from None
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UserError(
                f"{self.path}: expected features of shape ({len(images)}, D) for {len(images)} images, found {found}"
            )
        if not bool(torch.isfinite(features).all()):
            raise UserError(f"{self.path}: the features are not finite; check evaluate.local.mean and std")
        return features.float().cpu()


def load_local_network(params: Params, root: Path) -> LocalNetwork:
    """Load the network that evaluate.local describes, on the CPU, and test it on two blank images.

    A relative path starts at `root`.

    Raises:
        UserError: the file is missing, has another SHA-256 or architecture, or gives no features.
    """
    path = root / Path(params.path).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; expected the file that evaluate.local.path names. Put it "
            "there, or remove local from evaluate.extractors"
        ) from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != params.sha256:
        raise UserError(
            f"{path}: SHA-256 is {digest}, but evaluate.local.sha256 is {params.sha256}. Use the right file, or change "
            "the hash if you trust this one"
        )
    network = (
        _torchscript(content, path) if params.architecture == "torchscript" else _torchvision(content, path, params)
    )
    loaded = LocalNetwork(network, params, path).eval()
    loaded(torch.zeros(2, 1, params.image_size, params.image_size, dtype=torch.uint8))
    return loaded


def _torchscript(content: bytes, path: Path) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch deprecates TorchScript, but many networks use it
            network: nn.Module = torch.jit.load(io.BytesIO(content), map_location="cpu")  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path}: not readable as TorchScript ({reason}); expected a file of torch.jit.save") from None
    return network


def _torchvision(content: bytes, path: Path, params: Params) -> nn.Module:
    """The architecture without its last layer and that layer's weights, so that it returns features."""
    from torchvision import models

    head = _HEADS[params.architecture]
    expected = (
        f"expected the weights of torchvision's {params.architecture} as safetensors (evaluate.local.architecture)"
    )
    try:
        tensors = {name: tensor for name, tensor in load(content).items() if not name.startswith(f"{head}.")}
    except SafetensorError as error:
        raise UserError(f"{path}: not readable as safetensors ({error}); {expected}") from None
    network: nn.Module = getattr(models, params.architecture)(weights=None)
    setattr(network, head, nn.Identity())
    state = network.state_dict()
    problems = {
        "missing": [name for name in state if name not in tensors and not name.endswith("num_batches_tracked")],
        "unknown": [name for name in tensors if name not in state],
        "of another shape": [name for name in tensors if name in state and tensors[name].shape != state[name].shape],
    }
    messages = [
        f"{len(names)} tensors {problem}, such as {', '.join(names[:_MAX_NAMED])}"
        for problem, names in problems.items()
        if names
    ]
    if messages:
        raise UserError(f"{path}: {'; '.join(messages)}; {expected}")
    network.load_state_dict(tensors, strict=False)  # num_batches_tracked may be absent
    return network
