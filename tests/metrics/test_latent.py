"""Codebook usage and perplexity, against counts in Python."""

import math
from collections import Counter

import pytest
import torch

from medgen.metrics.latent import codebook_use


@pytest.mark.parametrize(
    ("codes", "usage", "perplexity"),
    [
        (torch.arange(8).view(2, 2, 2), 1.0, 8.0),
        (torch.arange(4).repeat(2).view(2, 2, 2), 0.5, 4.0),
        (torch.full((2, 2, 2), 7), 1 / 8, 1.0),
        (torch.tensor([[[0, 0], [0, 1]]]), 2 / 8, 4 / 3**0.75),
    ],
    ids=["all evenly", "half of them", "one", "unevenly"],
)
def test_codebook_use_of_known_codes(codes, usage, perplexity):
    assert codebook_use(codes, 8) == pytest.approx({"codebook_usage": usage, "codebook_perplexity": perplexity})


def test_perplexity_agrees_with_counts():
    codes = torch.randint(0, 50, (30, 4, 4), generator=torch.Generator().manual_seed(0)) ** 2 // 50
    shares = [count / codes.numel() for count in Counter(codes.flatten().tolist()).values()]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    found = codebook_use(codes, 64)
    assert found["codebook_perplexity"] == pytest.approx(expected)
    assert found["codebook_usage"] == pytest.approx(len(shares) / 64)
