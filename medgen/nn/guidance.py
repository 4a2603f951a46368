"""Label dropout, which makes classifier-free guidance possible (Ho & Salimans 2022)."""

import torch
from torch import Tensor

from medgen.nn.parallel import rand

LABEL_DROPOUT = 0.1


def drop_labels(labels: Tensor, conditional: bool, generator: torch.Generator) -> Tensor:
    """Labels (B,) with random label dropout: -1 means unconditional, as all are if not `conditional`."""
    dropped = (rand(len(labels), generator=generator) < LABEL_DROPOUT).to(labels.device)
    return labels.masked_fill(dropped, -1) if conditional else torch.full_like(labels, -1)
