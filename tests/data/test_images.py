"""Planes of volumes, which metrics of sets and figures use."""

import numpy as np
import torch

from medgen.data.images import middle_planes, side_by_side


def test_the_planes_of_a_volume_are_its_middle_slices_on_black_squares():
    volume = torch.arange(1, 1 + 4 * 6 * 8, dtype=torch.uint8).view(1, 1, 4, 6, 8)
    planes, voxels = middle_planes(volume), volume[0, 0].numpy()
    assert planes.shape == (1, 3, 8, 8) and planes.dtype == torch.uint8
    for plane, expected in zip(planes[0].numpy(), (voxels[2], voxels[:, 3], voxels[:, :, 4]), strict=True):
        top, left = ((8 - side) // 2 for side in expected.shape)
        canvas = np.zeros((8, 8), np.uint8)
        canvas[top : top + expected.shape[0], left : left + expected.shape[1]] = expected
        assert np.array_equal(plane, canvas)
    assert torch.equal(side_by_side(planes, 1)[0, 0], torch.cat(list(planes[0]), dim=1))


def test_images_have_no_planes():
    images = torch.rand(2, 3, 8, 9)
    assert middle_planes(images) is images
