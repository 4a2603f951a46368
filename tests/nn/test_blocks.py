"""Building blocks of networks."""

import numpy as np
import pytest
import torch

from medgen.nn.blocks import from_channels, to_channels


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("sides", [(8, 12), (4, 8, 12)])
def test_pixels_of_a_patch_become_channels_and_return(factor: int, sides: tuple[int, ...]) -> None:
    images = torch.rand(2, 3, *sides)
    patches = to_channels(images, factor)
    found = patches.unflatten(1, (3, *[factor] * len(sides)))
    for place in np.ndindex(*[factor] * len(sides)):
        expected = images[(slice(None), slice(None), *(slice(first, None, factor) for first in place))]
        assert torch.equal(found[(slice(None), slice(None), *place)], expected)
    assert torch.equal(from_channels(patches, factor), images)
