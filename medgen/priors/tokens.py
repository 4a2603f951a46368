"""`tokens`: the codes of a VQ-VAE, drawn by a network that fills in what is masked, class-conditionally.

MaskGIT (Chang et al. 2022): a transformer sees a grid of codes of which some are masked, and learns what they were.
From a grid that is all mask, a few steps fill it: at each one every masked place is drawn, and those the network is
surest of are kept. A label's strength acts on logits (Chang et al., Muse, 2023).

Labels of codes are not smoothed, as they are in the paper: with 512 codes of which a place takes few, a tenth of the
draws would be codes that are never seen there, and the loss would not be a likelihood. Dropout and the choice of the
epoch by held-out loss stand against overfitting.

Shapes: B latents in a batch, K codes of Z numbers, h w sides of the grid, P = h·w places, C channels of the network.
"""

import math
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medgen import config
from medgen.errors import UserError
from medgen.priors.axes import all_alike, check_finite
from medgen.priors.gaussian import class_frequencies
from medgen.priors.learned import NetworkPrior

SAMPLING_STEPS = 10  # the paper finds its best between 8 and 12
# of the Gumbel noise on log-probabilities at the first step, as in the paper's published code; measured on quantised
# random fields: with 1 the places of a grid are too much alike, with 0 nearly all of one code
CHOICE_TEMPERATURE = 4.5
HEAD_CHANNELS = 32
_MAX_COMPARED = 1 << 24  # numbers of a table of places times codes: 64 MB


class Tokens(NetworkPrior):
    """Masked-token transformer over the codes of a latent grid; told the class where `conditional`."""

    name: ClassVar[str] = "tokens"

    def __init__(
        self, latent_shape: tuple[int, ...], known: Mapping[str, Tensor], network: nn.Module, prior: config.Prior
    ) -> None:
        super().__init__(latent_shape, known, network, prior)
        self.codebook = known["codebook"]  # (K, Z)

    @classmethod
    def start(
        cls,
        latents: Tensor,
        labels: Tensor | None,
        num_classes: int,
        prior: config.Prior,
        variance: Tensor | None = None,
        codebook: Tensor | None = None,
    ) -> Self:
        """See `medgen.priors.LearnedPrior.start`; a code has no variance."""
        if codebook is None:
            raise UserError(
                "prior.name: tokens needs a model whose latents are made of codes (model.name: vqvae); "
                "set prior.name to gmm or flow"
            )
        codebook = codebook.detach().float().cpu()
        _check_codes(latents.float().cpu(), codebook)
        known = {"codebook": codebook, "frequencies": class_frequencies(labels, num_classes)}
        return cls.begin(tuple(latents.shape[1:]), known, prior)

    @staticmethod
    def build(
        latent_shape: tuple[int, ...], known: Mapping[str, Tensor], num_classes: int, prior: config.Prior
    ) -> "MaskedTransformer":
        """See `NetworkPrior.build`."""
        _, height, width = latent_shape
        sizes = ((height, width), len(known["codebook"]), num_classes)
        return MaskedTransformer(*sizes, prior.channels, prior.blocks, prior.dropout)

    def loss(self, latents: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Cross-entropy in nats of the masked codes, mean over them; see `medgen.priors.LearnedPrior.loss`."""
        codes = nearest_codes(latents, self.codebook.to(latents.device))
        masked = draw_mask(len(codes), codes.shape[1], generator).to(latents.device)
        labels = self.told(labels, generator)
        logits = self.network(codes.masked_fill(masked, len(self.codebook)), labels)
        return F.cross_entropy(logits[masked].float(), codes[masked])

    def _draw(self, labels: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
        sides = self.latent_shape[1:]
        size = max(1, _MAX_COMPARED // (math.prod(sides) * len(self.codebook)))
        parts = [self._fill(part.to(device), generator).cpu() for part in torch.split(labels, size)]
        return F.embedding(torch.cat(parts).view(-1, *sides), self.codebook).movedim(-1, 1).contiguous()

    def _fill(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Codes (B, P) of labels (B,), from all masked; the paper's section 3.2."""
        num_places, mask = math.prod(self.latent_shape[1:]), len(self.codebook)
        codes = torch.full((len(labels), num_places), mask, device=labels.device)
        num_masked = masked_after(num_places, self.prior.sampling_steps or SAMPLING_STEPS)
        for step, left in enumerate(num_masked, start=1):
            probabilities = self._logits(codes, labels).softmax(dim=-1)
            uniform = torch.rand(2, *codes.shape, generator=generator).to(labels.device)
            masked = codes == mask
            drawn = draw_codes(probabilities, uniform[0])
            sureness = probabilities.gather(-1, drawn[..., None])[..., 0].log()
            gumbel = -torch.log(-torch.log(uniform[1].clamp(1e-7, 1 - 1e-7)))
            sureness = sureness + CHOICE_TEMPERATURE * (1 - step / len(num_masked)) * gumbel
            codes = torch.where(masked, drawn, codes)
            unsure = sureness.masked_fill(~masked, torch.inf).argsort(dim=1)[:, :left]
            codes = codes.scatter(1, unsure, mask)
        return codes

    def _logits(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Codes (B, P), labels (B,) -> logits (B, P, K), as far from those of no label as guidance says."""
        guidance = self.prior.guidance
        if not self.conditional or guidance == 1.0:
            return self.network(codes, labels).float()  # type: ignore[no-any-return]
        untold = self.network(codes, torch.full_like(labels, -1)).float()
        if guidance == 0.0:
            return untold  # type: ignore[no-any-return]
        return untold + guidance * (self.network(codes, labels).float() - untold)  # type: ignore[no-any-return]


class MaskedTransformer(nn.Module):
    """Bidirectional transformer, normed before each layer (Xiong et al. 2020), over grids of codes, mask and class.

    A place is known by its row and column. What a code means is learnt once: the embedding also gives the logits.

    Args:
        sides: (h, w) of the grid.
        num_codes: K; number K is the mask.
        num_classes: how many labels there are; 0 for none.
        channels: width; a head has about 32 of them.
        blocks: attention and two-layer network, so many times.
        dropout: share of a layer's numbers that are left out in training.
    """

    def __init__(
        self, sides: tuple[int, int], num_codes: int, num_classes: int, channels: int, blocks: int, dropout: float
    ) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.code = nn.Embedding(num_codes + 1, channels)
        self.label = nn.Embedding(num_classes + 1, channels)  # row 0 is "no label"
        self.row = nn.Parameter(torch.empty(sides[0], 1, channels))
        self.column = nn.Parameter(torch.empty(sides[1], channels))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(channels, dropout) for _ in range(blocks)))
        self.head = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels), nn.GELU())
        self.norm = nn.LayerNorm(channels)
        self.bias = nn.Parameter(torch.zeros(num_codes))
        for embedding in (self.code.weight, self.label.weight, self.row, self.column):
            nn.init.normal_(embedding, std=0.2)  # with 0.02, as is usual, it learns more slowly
        nn.init.constant_(self.norm.weight, 0.1)  # so that the first logits are near 0 all the same

    def forward(self, codes: Tensor, label: Tensor) -> Tensor:
        """Codes (B, P), K where masked, and labels (B,), -1 for none -> logits (B, P, K)."""
        place = (self.row + self.column).flatten(0, 1)  # (P, C)
        x = self.code(codes) + place + self.label(label + 1)[:, None]
        x = self.norm(self.head(self.blocks(self.dropout(x))))
        return F.linear(x, self.code.weight[: self.num_codes], self.bias)


class Block(nn.Module):
    """Self-attention over all places, then a two-layer network at each, both beside a shortcut."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = math.gcd(channels, max(1, channels // HEAD_CHANNELS))
        self.norm1 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, 4 * channels)
        self.narrow = nn.Linear(4 * channels, channels)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.project, self.narrow):  # the block starts as its shortcut
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, C) -> (B, P, C)."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, P, C / heads)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.project(attended))
        return x + self.dropout(self.narrow(F.gelu(self.widen(self.norm2(x)))))  # type: ignore[no-any-return]


def nearest_codes(latents: Tensor, codebook: Tensor) -> Tensor:
    """Latents (B, Z, h, w), codebook (K, Z) -> numbers of the nearest codes (B, P), in bounded memory."""
    vectors = latents.movedim(1, -1).flatten(0, 2).float()
    parts = torch.split(vectors, max(1, _MAX_COMPARED // len(codebook)))
    return torch.cat([torch.cdist(part, codebook).argmin(dim=1) for part in parts]).view(len(latents), -1)


def draw_mask(num: int, num_places: int, generator: torch.Generator) -> Tensor:
    """Which places are masked, (num, P) bool: cos(π r / 2) of them, at least one, with r uniform per row."""
    share = torch.cos(0.5 * math.pi * torch.rand(num, 1, generator=generator))
    ranks = torch.rand(num, num_places, generator=generator).argsort(dim=1).argsort(dim=1)
    return ranks < (share * num_places).ceil().clamp_min(1)


def masked_after(num_places: int, num_steps: int) -> list[int]:
    """How many places are still masked after each step: P · cos(π t / 2), one fewer each step at least, in the end 0.

    There are no more steps than places.
    """
    num_steps = min(num_steps, num_places)
    counts, left = [], num_places
    for step in range(1, num_steps + 1):
        planned = math.floor(num_places * math.cos(0.5 * math.pi * step / num_steps))
        left = max(num_steps - step, min(left - 1, planned))
        counts.append(left)
    return counts


def draw_codes(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """A code at each place, (B, P), from probabilities (B, P, K) and uniform numbers (B, P) in [0, 1)."""
    cumulative = probabilities.cumsum(dim=-1)
    reached = uniform[..., None] * cumulative[..., -1:]  # their sum is 1 only up to rounding
    return (cumulative <= reached).sum(dim=-1).clamp_max(probabilities.shape[-1] - 1)


def _check_codes(latents: Tensor, codebook: Tensor) -> None:
    """Raises UserError where latents (N, Z, h, w) are not finite, not of the codebook (K, Z), or all alike."""
    check_finite(latents)
    if latents.dim() != 4 or latents.shape[1] != codebook.shape[1] or not _are_codes(latents, codebook):
        raise UserError(
            f"prior.name: tokens needs latents that are made of the model's codes; those of shape "
            f"{tuple(latents.shape[1:])} are not; set prior.name to gmm or flow"
        )
    if bool((latents == latents[:1]).all()):
        raise all_alike(latents, "try another model.codebook")


def _are_codes(latents: Tensor, codebook: Tensor) -> bool:
    """Whether every vector of the latents is one of the codebook, up to rounding."""
    size = max(1, _MAX_COMPARED // (len(codebook) * latents[0, 0].numel()))
    tolerance = 1e-3 * float(codebook.abs().max())
    for part in torch.split(latents, size):
        nearest = F.embedding(nearest_codes(part, codebook), codebook)  # (b, P, Z)
        if bool(((nearest - part.flatten(2).mT).abs() > tolerance).any()):
            return False
    return True
