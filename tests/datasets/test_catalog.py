"""Tests of the dataset catalog: every entry is complete, and docs/data.md shows it."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from medgen.datasets import catalog
from medgen.datasets.catalog import Kaggle, Manual, Web
from medgen.errors import UserError
from medgen.ingest.formats.medmnist import SIDES, class_names

NAMES = {
    "chest-xray-pneumonia", "chest-xray-covid19-pneumonia", "oasis-slices", "oasis1-volumes", "mnist", "cifar10",
    "oxford-pet", "montgomery", "shenzhen", "openist", "pathmnist", "chestmnist", "dermamnist", "octmnist",
    "pneumoniamnist", "retinamnist", "breastmnist", "bloodmnist", "tissuemnist", "organamnist", "organcmnist",
    "organsmnist",
}  # fmt: skip
DATASETS = catalog.load()


def test_names() -> None:
    """A new entry needs no change here; one that is gone does."""
    assert {name for name, dataset in DATASETS.items() if dataset.variant_of is None} >= NAMES
    sizes = {name for name in DATASETS if name.startswith("pneumoniamnist")}
    assert sizes == {"pneumoniamnist", *(f"pneumoniamnist_{side}" for side in SIDES[1:])}


@pytest.mark.parametrize("name", DATASETS)
def test_entry_is_complete(name: str) -> None:
    dataset = DATASETS[name]
    for field in ("title", "layout", "splits", "patients", "license", "citation"):
        assert getattr(dataset, field), field
    counts = [int(count) for count in re.findall(r"(?:train|val|test) (\d+)", dataset.splits)]
    assert dataset.splits == "none" or sum(counts) == dataset.num_images > 0
    assert dataset.num_images > 0 and dataset.size > 0
    assert len(set(dataset.classes)) == len(dataset.classes)
    assert dataset.source.page.startswith("https://")
    match dataset.source:
        case Web(files=files):
            assert files
            for file in files:
                assert file.url.startswith("https://") and file.name
                assert all(url.endswith(f"/{file.name}") for url in file.mirrors)
                assert file.md5 is None or re.fullmatch(r"[0-9a-f]{32}", file.md5)
        case Kaggle(handle=handle):
            assert re.fullmatch(r"[\w-]+/[\w-]+/versions/\d+", handle)
        case Manual(steps=steps):
            assert steps


def test_no_checksum_is_copied_from_another_file() -> None:
    files = [file for dataset in DATASETS.values() if isinstance(dataset.source, Web) for file in dataset.source.files]
    checksums = [file.md5 for file in files if file.md5]
    assert len(set(checksums)) == len(checksums) >= 55


def test_addresses_and_checksums_equal_those_of_torchvision() -> None:
    from torchvision.datasets import MNIST, OxfordIIITPet

    expected = {
        "mnist": {file: (md5, {mirror + file for mirror in MNIST.mirrors}) for file, md5 in MNIST.resources},
        "oxford-pet": {url.rpartition("/")[2]: (md5, {url}) for url, md5 in OxfordIIITPet._RESOURCES},
    }
    for name, files in expected.items():
        source = DATASETS[name].source
        assert isinstance(source, Web)
        assert {file.name: (file.md5, {file.url, *file.mirrors}) for file in source.files} == files


def test_entries_are_frozen_and_refuse_unknown_keys() -> None:
    dataset = DATASETS["mnist"]
    with pytest.raises(ValidationError, match="frozen"):
        dataset.title = "other"
    with pytest.raises(ValidationError, match="licence"):
        catalog.Dataset.model_validate({**dataset.model_dump(), "licence": "none"})


@pytest.mark.parametrize(
    ("stem", "names"),
    [
        ("pneumoniamnist", ("normal", "pneumonia")),
        ("pneumoniamnist_128", ("normal", "pneumonia")),
        ("PneumoniaMNIST", ("normal", "pneumonia")),
        ("mnist", None),  # its labels are digits
        ("pneumoniamnist_of_mine", None),
        ("scan", None),
    ],
)
def test_class_names_by_file_name(stem: str, names: tuple[str, ...] | None) -> None:
    assert class_names(stem) == names


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'pneumoniamnist'"):
        catalog.find("pneumonamnist")


def test_list_has_one_line_per_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    catalog.show()
    lines = capsys.readouterr().out.splitlines()
    listed = [name for name, dataset in DATASETS.items() if dataset.variant_of is None]
    assert [line.split()[0] for line in lines[: len(listed)]] == listed
    assert len(lines) <= len(listed) + 3
    assert max(map(len, lines)) <= 140


@pytest.mark.parametrize("name", ["cifar10", "pneumoniamnist_64", "oasis1-volumes"])
def test_details_of_a_dataset(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    catalog.show_dataset(name)
    output, dataset = capsys.readouterr().out, DATASETS[name]
    for text in (name, dataset.title, dataset.license, dataset.citation, dataset.splits, dataset.source.page):
        assert text in output
    for heading in catalog.HEADINGS:
        assert f"{heading}:" in output


def test_docs_show_the_catalog(root: Path) -> None:
    """catalog.to_markdown() makes the table."""
    text = (root / "docs" / "data.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- known datasets -->\n")[2].partition("<!-- end of known datasets -->")[0]
    assert shown == catalog.to_markdown()
