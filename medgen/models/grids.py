"""Sides of the grids between image and latent."""

from medgen.errors import UserError


def default_grid(image_size: int) -> int:
    """Side of the latent grid by default: 8 for images up to 64 px, an eighth of the side for larger ones.

    8 was measured on chest X-rays (docs/results.md); an eighth is an estimate.
    """
    size = image_size
    while size % 2 == 0 and size > max(8, image_size // 8):
        size //= 2
    return size


def stage_sizes(image_size: int, latent_size: int) -> list[int]:
    """Grid sides after each downsampling by 2, from image_size / 2 to latent_size.

    Raises:
        UserError: image_size is not latent_size times a power of two.
    """
    sizes = []
    size = image_size
    while size > latent_size and size % 2 == 0:
        size //= 2
        sizes.append(size)
    if not sizes or sizes[-1] != latent_size:
        raise UserError(
            f"model.latent_size: {latent_size} does not fit images of {image_size} px; "
            f"expected {image_size} divided by 2, 4, 8, …; set model.latent_size or preprocess.image_size"
        )
    return sizes


def flat_sizes(image_size: int, smallest: int | None) -> list[int]:
    """Grid sides of a flat model's convolutions, down to `smallest` or until at most 7 or odd (224 -> 7 in five).

    Raises:
        UserError: image_size is not `smallest` times a power of two, or is odd.
    """
    if smallest is not None:
        return stage_sizes(image_size, smallest)
    size = image_size
    while size % 2 == 0 and size > 7:
        size //= 2
    return stage_sizes(image_size, size)
