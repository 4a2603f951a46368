"""Figures: content of the files, and the same bytes for the same input."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medgen.reports.figures import differences, write_curves, write_gif, write_grid, write_scatter, write_stacks


def images(count: int, size: int = 32, channels: int = 1) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def frames(folder: Path) -> list[Path]:
    paths = [folder / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        write_grid(path, images(4) * i / 2)
    return paths


POINTS = np.array([[0.0, 1.0], [1.0, 2.0]])
WRITERS: dict[str, Callable[[Path], None]] = {
    "grid.png": lambda path: write_grid(path, images(5), captions=["NORMAL", "COVID19", "", "x" * 80, "ü"]),
    "pairs.png": lambda path: write_stacks(path, {"a": images(9), "b": images(9)}),
    "stacks.png": lambda path: write_stacks(path, {"a": images(3), "b": images(3)}, captions=["true: x\ngiven: y"] * 3),
    "scatter.png": lambda path: write_scatter(path, {"A": POINTS, "B": -POINTS}, {"samples": 2 * POINTS}, ("x", "y")),
    "curves.png": lambda path: write_curves(path, {"train": [1.0, 0.1], "val": [2.0, float("nan")]}, log=True),
    "progress.gif": lambda path: write_gif(path, frames(path.parent / "frames"), 0.2),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_input_gives_the_same_bytes_and_no_other_file(name: str, tmp_path: Path) -> None:
    contents = []
    for attempt in ("first", "second"):
        path = tmp_path / attempt / "new" / name
        WRITERS[name](path)
        assert [p.name for p in path.parent.iterdir() if p.is_file()] == [name]
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
    with Image.open(tmp_path / "first" / "new" / name) as image:
        assert not {"Software", "Creation Time", "date:create"} & image.info.keys()


@pytest.mark.parametrize(
    "values",
    [images(4, 128), (images(4, 128) * 255).round().to(torch.uint8).numpy(), images(4, 128).numpy()],
    ids=["tensor", "uint8 array", "float array"],
)
def test_grid_has_unchanged_pixels(values: object, tmp_path: Path) -> None:
    write_grid(tmp_path / "grid.png", values, columns=2)  # type: ignore[arg-type]
    drawn = np.asarray(Image.open(tmp_path / "grid.png"))
    expected = (images(4, 128) * 255).round().numpy()[:, 0]
    assert drawn.shape == (2 * 130 + 2, 2 * 130 + 2)
    for position in range(4):
        top, left = 2 + position // 2 * 130, 2 + position % 2 * 130
        np.testing.assert_array_equal(drawn[top : top + 128, left : left + 128], expected[position])


def test_small_images_are_enlarged_by_repeating_pixels(tmp_path: Path) -> None:
    write_grid(tmp_path / "grid.png", images(1, 32))
    drawn = np.asarray(Image.open(tmp_path / "grid.png"))[2:98, 2:98]
    np.testing.assert_array_equal(drawn[::3, ::3].repeat(3, 0).repeat(3, 1), drawn)


def test_colours_are_kept(tmp_path: Path) -> None:
    image = torch.zeros(1, 3, 96, 96)
    image[:, 0] = 1.0
    write_grid(tmp_path / "grid.png", image)
    write_stacks(tmp_path / "pairs.png", {"a": image, "b": image.flip(1)})
    drawn = np.asarray(Image.open(tmp_path / "grid.png"))
    np.testing.assert_array_equal(drawn[50, 50], [255, 0, 0])
    drawn = np.asarray(Image.open(tmp_path / "pairs.png"))
    np.testing.assert_array_equal(drawn[[50, 150], 60], [[255, 0, 0], [0, 0, 255]])


def test_the_first_images_are_on_top(tmp_path: Path) -> None:
    write_stacks(tmp_path / "pairs.png", {"a": torch.ones(3, 1, 100, 100), "b": torch.zeros(3, 1, 100, 100)})
    drawn = np.asarray(Image.open(tmp_path / "pairs.png"))
    assert (drawn[2:102, 22:120] == 255).all()
    assert (drawn[104:204, 22:120] == 0).all()


def test_caption_lines_are_under_their_stack_only(tmp_path: Path) -> None:
    lines = {"a": torch.ones(3, 1, 100, 100), "b": torch.ones(3, 1, 100, 100)}
    write_stacks(tmp_path / "plain.png", lines, columns=2)
    write_stacks(tmp_path / "stacks.png", lines, columns=2, captions=["one\ntwo", "", "three\n"])
    with Image.open(tmp_path / "plain.png") as plain, Image.open(tmp_path / "stacks.png") as stacks:
        assert stacks.height == plain.height + 4 * 18  # two rows of stacks, two lines each
        dark = np.asarray(stacks.convert("L")) < 128
    left, right = dark[:, 20:120].any(axis=1), dark[:, 122:].any(axis=1)
    assert not right.any()
    found = [left[top : top + 18].any() for top in (206, 224, 452, 470)]
    assert found == [True, True, True, False]
    assert not left[:206].any() and not left[242:452].any()


def test_gif_has_all_frames_and_shows_the_last_longest(tmp_path: Path) -> None:
    write_gif(tmp_path / "a.gif", frames(tmp_path / "frames"), 0.2)
    with Image.open(tmp_path / "a.gif") as gif:
        durations = []
        for position in range(gif.n_frames):
            gif.seek(position)
            durations.append(gif.info["duration"])
        assert gif.info["loop"] == 0
    assert durations == [200, 200, 800]


@pytest.mark.parametrize(
    "colours",
    [[(255, 255, 255), (0, 0, 0)], [(255, 0, 0), (0, 0, 255)], [(50 * i, 0, 250 - 50 * i) for i in range(6)]],
    ids=["white to black", "red to blue", "six"],
)
def test_frames_keep_their_colours(colours: list[tuple[int, int, int]], tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(len(colours))]
    for path, colour in zip(paths, colours, strict=True):
        Image.new("RGB", (20, 20), colour).save(path)
    write_gif(tmp_path / "a.gif", paths, 0.2)
    with Image.open(tmp_path / "a.gif") as gif:
        for position, colour in enumerate(colours):
            gif.seek(position)
            shown = np.asarray(gif.convert("RGB")).astype(int)
            assert np.abs(shown - colour).max() <= 8, position  # quantisation keeps five bits or more


def test_curves_have_a_second_plot_with_a_logarithmic_axis(tmp_path: Path) -> None:
    write_curves(tmp_path / "linear.png", {"loss": [1.0, 0.5]})
    write_curves(tmp_path / "both.png", {"loss": [1.0, 0.5], "kl": [0.0, 0.0]}, log=True)
    with Image.open(tmp_path / "linear.png") as linear, Image.open(tmp_path / "both.png") as both:
        assert both.width == 2 * linear.width


def test_a_line_marks_the_begin_of_each_of_several_phases(tmp_path: Path) -> None:
    contents = []
    for phases in ({}, {"one": 1}, {"one": 1, "two": 3}, {"one": 1, "two": 4}):
        write_curves(tmp_path / "curves.png", {"loss": [4.0, 3.0, 2.0, 1.0]}, phases=phases)
        contents.append((tmp_path / "curves.png").read_bytes())
    assert contents[0] == contents[1] and len(set(contents)) == 3


def test_difference_maps_show_darker_blue_and_brighter_red() -> None:
    image = torch.full((1, 3, 1, 3), 0.5)
    other = torch.tensor([0.5, 0.2, 0.6]).expand(1, 3, 1, 3)
    equal, darker, brighter = differences(image, other)[0, :, 0].T
    assert equal.tolist() == [1.0, 1.0, 1.0]
    assert darker.mul(255).round().tolist() == [0, 114, 178]
    assert brighter[0] > brighter[2] and brighter.min() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: write_grid(path, torch.zeros(0, 1, 8, 8)), "N > 0"),
        (lambda path: write_grid(path, torch.zeros(2, 2, 8, 8)), "1 or 3"),
        (lambda path: write_grid(path, images(2), captions=["one"]), "found 1, expected 2"),
        (lambda path: write_stacks(path, {"a": images(2), "b": images(3)}), "bs: expected shape"),
        (lambda path: write_stacks(path, {"a": images(2)}, captions=["one"]), "found 1, expected 2"),
        (lambda path: write_curves(path, {}), "found none"),
        (lambda path: write_gif(path, []), "found none"),
    ],
)
def test_invalid_input_is_an_error_and_no_file_is_written(
    call: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())
