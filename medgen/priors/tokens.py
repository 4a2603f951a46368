"""`tokens`: class-conditional prior over the codes of a VQ-VAE, by predicting masked codes.

MaskGIT (Chang et al. 2022): a transformer predicts the masked codes of a grid. Sampling starts from a grid of masks and
fills it in a few steps: each step draws all masked codes and keeps those with the highest probability. Guidance acts on
the logits (Chang et al., Muse, 2023).

The cross-entropy has no label smoothing, unlike the paper's: a position takes few of 512 codes, so with smoothing a
tenth of the draws would be codes that never occur there, and the loss would not be a likelihood. Dropout and keeping
the epoch of the lowest held-out loss prevent overfitting.

Shapes: B batch, K codes of dimension Z, h w sides of the grid, P = h·w positions.
"""

import math
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from medgen import config
from medgen.data.conditions import ConditionSpace
from medgen.errors import UserError
from medgen.nn.conditions import Conditions, drop_conditions, grid_channels
from medgen.nn.parallel import mean_over_processes, rand
from medgen.nn.quantizer import nearest_codes
from medgen.nn.transformer import MaskedTransformer
from medgen.priors.axes import LatentArray, check_finite, constant_latents_error, spread
from medgen.priors.gaussian import class_frequencies
from medgen.priors.neural import NeuralPrior, conditioning_classes

DEFAULT_SAMPLING_STEPS = 10  # the paper finds its best between 8 and 12
# scale of the Gumbel noise on log-probabilities at the first step, as in the paper's published code; measured on
# quantised random fields: with 1 the positions of a grid are too similar, with 0 nearly all have the same code
CHOICE_TEMPERATURE = 4.5
_MAX_LOGITS = 1 << 24  # held at once: 64 MB
_NUM_GROUPS = 8  # of positions that are masked together, for likelihoods
_NUM_CHECKED = 1024  # latents that are compared with the codebook before training, at most


class Tokens(NeuralPrior):
    """Masked-token transformer over the codes of a latent grid, class-conditional if `conditional`."""

    name: ClassVar[str] = "tokens"

    @property
    def codebook(self) -> Tensor:
        """The codes (K, Z)."""
        return self.buffers["codebook"]

    @classmethod
    def create(
        cls,
        latents: LatentArray,
        labels: Tensor | None,
        num_classes: int,
        params: config.Prior,
        variance: Tensor | None = None,
        codebook: Tensor | None = None,
        space: ConditionSpace | None = None,
    ) -> Self:
        """See `NeuralPrior.create`; a code has no variance."""
        if codebook is None:
            raise UserError(
                "prior.name: tokens needs a model with a codebook (model.name: vqvae); set prior.name to gmm or flow"
            )
        codebook = codebook.detach().float().cpu()
        _check_codes(latents[spread(len(latents), _NUM_CHECKED)].float(), codebook)
        buffers = {"codebook": codebook, "frequencies": class_frequencies(labels, num_classes)}
        return cls.initialise(tuple(latents.shape[1:]), buffers, params, space)

    @staticmethod
    def build_network(
        latent_shape: tuple[int, ...],
        buffers: Mapping[str, Tensor],
        params: config.Prior,
        space: ConditionSpace | None = None,
    ) -> MaskedTransformer:
        """See `NeuralPrior.build_network`."""
        num_classes = conditioning_classes(params, buffers["frequencies"])
        sizes = (latent_shape[1:], len(buffers["codebook"]), num_classes)
        num_values, context = 0 if space is None else space.size, grid_channels(space, latent_shape[1:])
        return MaskedTransformer(*sizes, params.channels, params.blocks, params.dropout, num_values, context)

    def loss(
        self, latents: Tensor, labels: Tensor, generator: torch.Generator, conditions: Conditions | None = None
    ) -> Tensor:
        """Cross-entropy in nats, mean over the masked codes; see `NeuralPrior.loss`."""
        codes = nearest_codes(latents, self.codebook.to(latents.device)).flatten(1)
        masked = draw_mask(len(codes), codes.shape[1], generator).to(latents.device)
        labels, conditions = drop_conditions(labels, conditions, self.conditional, self.space, generator)
        logits = self._output(codes.masked_fill(masked, len(self.codebook)), labels, self._on_grid(conditions))
        total = F.cross_entropy(logits[masked].float(), codes[masked], reduction="sum")
        return total / mean_over_processes(masked.sum().float())

    @torch.no_grad()
    def log_likelihood_map(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Log-probability in nats (B, h, w) of each code (B, h, w), given labels (B,) and most of the other codes.

        Codes of volumes are (B, d, h, w).

        The positions are masked in eight groups of distant positions, and each group is predicted from the others: a
        pseudo-log-likelihood (Salazar et al. 2020) in eight passes instead of one for each position.
        """
        self.network.eval()
        sides = codes.shape[1:]
        places = torch.meshgrid(*map(torch.arange, sides), indexing="ij")
        steps = zip(places, (5, 3, 1)[-len(sides) :], strict=True)
        numbers = torch.stack([step * place for place, step in steps]).sum(dim=0)
        group = numbers.flatten().to(codes.device) % _NUM_GROUPS
        flat = codes.flatten(1)
        result = torch.zeros(flat.shape, device=flat.device)
        for number in range(_NUM_GROUPS):
            masked = group == number
            if bool(masked.any()):
                logits = self._logits(flat.masked_fill(masked, len(self.codebook)), labels)[:, masked]
                chosen = logits.log_softmax(dim=-1).gather(-1, flat[:, masked, None])[..., 0]
                result[:, masked] = chosen
        return result.view(codes.shape)

    def _sample(
        self, labels: Tensor, conditions: Conditions | None, generator: torch.Generator, device: torch.device
    ) -> Tensor:
        sides = self.latent_shape[1:]
        size = max(1, _MAX_LOGITS // (math.prod(sides) * len(self.codebook)))
        parts = []
        for rows in torch.split(torch.arange(len(labels)), size):
            own = self._on_grid(None if conditions is None else conditions[rows].to(device))
            parts.append(self._decode_codes(labels[rows].to(device), own, generator).cpu())
        return F.embedding(torch.cat(parts).view(-1, *sides), self.codebook).movedim(-1, 1).contiguous()

    def _decode_codes(self, labels: Tensor, conditions: Conditions | None, generator: torch.Generator) -> Tensor:
        """Codes (B, P) of labels (B,), by iterative decoding from a grid of masks (section 3.2 of the paper)."""
        num_positions, mask = math.prod(self.latent_shape[1:]), len(self.codebook)
        codes = torch.full((len(labels), num_positions), mask, device=labels.device)
        num_masked = masked_after(num_positions, self.params.sampling_steps or DEFAULT_SAMPLING_STEPS)
        for step, left in enumerate(num_masked, start=1):
            probabilities = self._logits(codes, labels, conditions).softmax(dim=-1)
            uniform = torch.rand(2, *codes.shape, generator=generator).to(labels.device)
            masked = codes == mask
            drawn = draw_codes(probabilities, uniform[0])
            confidence = probabilities.gather(-1, drawn[..., None])[..., 0].log()
            gumbel = -torch.log(-torch.log(uniform[1].clamp(1e-7, 1 - 1e-7)))
            confidence = confidence + CHOICE_TEMPERATURE * (1 - step / len(num_masked)) * gumbel
            codes = torch.where(masked, drawn, codes)
            least_confident = confidence.masked_fill(~masked, torch.inf).argsort(dim=1)[:, :left]
            codes = codes.scatter(1, least_confident, mask)
        return codes

    def _logits(self, codes: Tensor, labels: Tensor, conditions: Conditions | None = None) -> Tensor:
        """Logits (B, P, K) with guidance: unconditional + guidance · (conditional - unconditional)."""
        guidance = self.params.guidance
        if guidance == 1.0 or not (self.conditional or self.space):
            return self._output(codes, labels, conditions).float()
        nothing = None if conditions is None else conditions.cleared()
        unconditional = self._output(codes, torch.full_like(labels, -1), nothing).float()
        if guidance == 0.0:
            return unconditional
        conditional = self._output(codes, labels, conditions).float()
        return unconditional + guidance * (conditional - unconditional)

    def _output(self, codes: Tensor, labels: Tensor, conditions: Conditions | None) -> Tensor:
        """Logits (B, P, K) of the network, which takes conditions on its grid; None: unknown."""
        if self.space is None:
            return self.network(codes, labels)  # type: ignore[no-any-return]
        if conditions is None:
            conditions = Conditions.unknown(self.space, len(codes), codes.device).on_grid(self.latent_shape[1:])
        return self.network(codes, labels, conditions.values, conditions.maps)  # type: ignore[no-any-return]

    def _on_grid(self, conditions: Conditions | None) -> Conditions | None:
        return None if conditions is None else conditions.on_grid(self.latent_shape[1:])


def draw_mask(num: int, num_positions: int, generator: torch.Generator) -> Tensor:
    """Random masks (num, P) bool: a share cos(π r / 2) of the positions, at least one, with r uniform per row."""
    share = torch.cos(0.5 * math.pi * rand(num, 1, generator=generator))
    ranks = rand(num, num_positions, generator=generator).argsort(dim=1).argsort(dim=1)
    return ranks < (share * num_positions).ceil().clamp_min(1)


def masked_after(num_positions: int, num_steps: int) -> list[int]:
    """Number of positions still masked after each step t: P · cos(π t / 2), falling by at least one a step, to 0.

    There are at most as many steps as positions.
    """
    num_steps = min(num_steps, num_positions)
    counts, left = [], num_positions
    for step in range(1, num_steps + 1):
        planned = math.floor(num_positions * math.cos(0.5 * math.pi * step / num_steps))
        left = max(num_steps - step, min(left - 1, planned))
        counts.append(left)
    return counts


def draw_codes(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Codes (B, P) drawn with probabilities (B, P, K) from uniform numbers (B, P) in [0, 1)."""
    cumulative = probabilities.cumsum(dim=-1)
    threshold = uniform[..., None] * cumulative[..., -1:]  # the sum of the probabilities is 1 only up to rounding
    return (cumulative <= threshold).sum(dim=-1).clamp_max(probabilities.shape[-1] - 1)


def _check_codes(latents: Tensor, codebook: Tensor) -> None:
    """Raise UserError if latents (N, Z, h, w) are not finite, not made of the codebook (K, Z), or all equal."""
    check_finite(latents)
    if latents.dim() < 4 or latents.shape[1] != codebook.shape[1] or not _are_codes(latents, codebook):
        raise UserError(
            f"prior.name: tokens needs latents made of the model's codes, found others of shape "
            f"{tuple(latents.shape[1:])}; set prior.name to gmm or flow"
        )
    if bool((latents == latents[:1]).all()):
        raise constant_latents_error(latents, "try another model.codebook")


def _are_codes(latents: Tensor, codebook: Tensor) -> bool:
    """True if every vector of the latents is a vector of the codebook, up to rounding."""
    size = max(1, _MAX_LOGITS // (len(codebook) * latents[0, 0].numel()))
    tolerance = 1e-3 * float(codebook.abs().max())
    for part in torch.split(latents, size):
        nearest = F.embedding(nearest_codes(part, codebook), codebook).movedim(-1, 1)  # (b, Z, h, w)
        if bool(((nearest - part).abs() > tolerance).any()):
            return False
    return True
