"""The table of known datasets is complete, and the documents show it."""

import re
from pathlib import Path

import pytest

from medgen.datasets import catalog
from medgen.datasets.catalog import KNOWN, ByHand, Kaggle, Torchvision, Web
from medgen.errors import UserError
from medgen.ingest.formats.medmnist import class_names

ASKED_FOR = {
    "chest-xray-pneumonia", "chest-xray-covid19-pneumonia", "oasis-slices", "oasis1-volumes", "mnist", "cifar10",
    "oxford-pet", "montgomery", "shenzhen", "openist", "pathmnist", "chestmnist", "dermamnist", "octmnist",
    "pneumoniamnist", "retinamnist", "breastmnist", "bloodmnist", "tissuemnist", "organamnist", "organcmnist",
    "organsmnist",
}  # fmt: skip


def test_the_table_has_what_is_promised() -> None:
    assert {name for name, dataset in KNOWN.items() if dataset.variant_of is None} == ASKED_FOR
    for name, dataset in KNOWN.items():
        for field in ("title", "layout", "splits", "patients", "license", "citation"):
            assert getattr(dataset, field), (name, field)
        assert dataset.num_images > 0 and dataset.size > 0
        assert dataset.source.page.startswith("https://")
        assert len(set(dataset.classes)) == len(dataset.classes)


def test_split_counts_add_up_to_the_images() -> None:
    for name, dataset in KNOWN.items():
        counts = [int(count) for count in re.findall(r"(?:train|val|test) (\d+)", dataset.splits)]
        assert not counts or sum(counts) == dataset.num_images, name


def test_each_source_says_enough_to_fetch_it() -> None:
    for dataset in KNOWN.values():
        match dataset.source:
            case Web(files=files):
                for url, checksum in files:
                    assert url.startswith("https://")
                    assert checksum is None or re.fullmatch(r"md5:[0-9a-f]{32}", checksum)
            case Kaggle(handle=handle):
                assert re.fullmatch(r"[\w-]+/[\w-]+/versions/\d+", handle)
            case Torchvision(name=name):
                assert name in ("MNIST", "CIFAR10", "OxfordIIITPet")
            case ByHand(steps=steps):
                assert steps
    checksums = [
        checksum for known_ in KNOWN.values() if isinstance(known_.source, Web) for _, checksum in known_.source.files
    ]
    given = [checksum for checksum in checksums if checksum]
    assert len(given) == len(set(given)) == 48  # twelve sets in four sizes, none copied from another


@pytest.mark.parametrize(
    ("stem", "names"),
    [
        ("pneumoniamnist", ("normal", "pneumonia")),
        ("pneumoniamnist_128", ("normal", "pneumonia")),
        ("PneumoniaMNIST", ("normal", "pneumonia")),
        ("mnist", None),  # a label there is a digit already
        ("pneumoniamnist_of_mine", None),
        ("scan", None),
    ],
)
def test_numbers_get_their_names_by_the_file(stem: str, names: tuple[str, ...] | None) -> None:
    assert class_names(stem) == names


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'pneumoniamnist'"):
        catalog.find("pneumonamnist")


def test_the_list_fits_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    catalog.show()
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    for name in ASKED_FOR:
        assert f" {name} " in said
    for word in (
        "layout:",
        "classes:",
        "splits:",
        "patient:",
        "licence:",
        "citation:",
        "images:",
        "download:",
        "from:",
    ):
        assert said.count(word) == len(ASKED_FOR)


def test_the_document_shows_the_same_table(root: Path) -> None:
    text = (root / "docs" / "data.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- known datasets -->\n")[2].partition("<!-- end of known datasets -->")[0]
    assert shown == catalog.to_markdown()
