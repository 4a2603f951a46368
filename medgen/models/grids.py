"""Sides of the grids between image and latent.

All sides of a grid are halved at each stage; its size is that of the shortest side.
"""

from medgen.errors import UserError

Sides = tuple[int, ...]  # height and width; of a volume depth, height and width


def default_grid(sides: Sides) -> int:
    """Size of the latent grid by default: 8 for images up to 64 px, an eighth of the shortest side for larger ones.

    8 was measured on chest X-rays (docs/results.md); an eighth is an estimate.
    """
    size = min(sides)
    return size >> _num_halvings(sides, max(8, size // 8))


def stage_sizes(sides: Sides, latent_size: int) -> list[int]:
    """Grid sizes after each downsampling by 2, from half of the shortest side to latent_size.

    Raises:
        UserError: the shortest side is not latent_size times a power of two, or another side not a multiple of it.
    """
    size = min(sides)
    count = _num_halvings(sides, latent_size)
    if not count or size >> count != latent_size:
        is_square = len(set(sides)) == 1
        shown = f"{size}" if is_square else " x ".join(map(str, sides))
        both = "" if is_square else f", by which {'both' if len(sides) == 2 else 'all'} sides are divisible"
        raise UserError(
            f"model.latent_size: {latent_size} does not fit images of {shown} px; "
            f"expected {size} divided by 2, 4, 8, …{both}; set model.latent_size or preprocess.image_size"
        )
    return [size >> stage for stage in range(1, count + 1)]


def flat_sizes(sides: Sides, smallest: int | None) -> list[int]:
    """Grid sizes of a flat model's convolutions, down to `smallest` or until at most 7 or odd (224 -> 7 in five).

    Raises:
        UserError: as `stage_sizes`, or a side is odd.
    """
    return stage_sizes(sides, smallest or min(sides) >> _num_halvings(sides, 7))


def latent_sides(sides: Sides, latent_size: int) -> Sides:
    """Sides of the latent grid; raises as `stage_sizes`."""
    count = len(stage_sizes(sides, latent_size))
    return tuple(side >> count for side in sides)


def _num_halvings(sides: Sides, smallest: int) -> int:
    """Number of times that all sides can be halved until the shortest one is at most `smallest`."""
    count = 0
    while all(side % 2 == 0 for side in sides) and min(sides) > smallest:
        sides, count = tuple(side // 2 for side in sides), count + 1
    return count
