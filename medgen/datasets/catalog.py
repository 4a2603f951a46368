"""The datasets in catalog.yaml: contents, licence, citation and download source of each.

medgen data list [NAME]
medgen data fetch pneumoniamnist
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from ruamel.yaml import YAML

from medgen.config import unknown_name
from medgen.console import say
from medgen.ingest.formats.medmnist import CLASSES, SIDES

HEADINGS = (
    "name", "description", "layout", "classes", "splits", "patient", "licence", "citation", "images", "download size",
    "source",
)  # fmt: skip


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Kaggle(_Entry):
    """A version of a Kaggle dataset; some need an account."""

    kind: Literal["kaggle"] = "kaggle"
    handle: str  # owner/dataset/versions/number
    folder: str = ""  # the folder of the download that holds the images

    @property
    def page(self) -> str:
        """Web page of the dataset."""
        return "https://www.kaggle.com/datasets/" + "/".join(self.handle.split("/")[:2])


class WebFile(_Entry):
    """A public file."""

    url: str
    mirrors: tuple[str, ...] = ()  # addresses of the same file, tried after `url`
    md5: str | None = None  # None: the publisher gives none

    @property
    def name(self) -> str:
        """File name: the last part of the address."""
        return self.url.partition("?")[0].rpartition("/")[2]


class Web(_Entry):
    """Public files of a dataset and its web page."""

    kind: Literal["web"] = "web"
    page: str
    files: tuple[WebFile, ...]


class Manual(_Entry):
    """A dataset that the user downloads after registration."""

    kind: Literal["manual"] = "manual"
    page: str
    steps: str  # instructions for the user


class Dataset(_Entry):
    """One dataset of the catalog."""

    title: str
    layout: str
    classes: tuple[str, ...]  # by class number; empty: unlabelled
    splits: str
    patients: str
    license: str
    citation: str
    num_images: int
    size: int  # bytes to download, rounded
    source: Annotated[Kaggle | Web | Manual, Field(discriminator="kind")]
    variant_of: str | None = None  # name of the dataset with the same images in another size


class _MedMnistSet(_Entry):
    title: str
    num_images: dict[Literal["train", "val", "test"], int]
    channels: int
    license: str
    size: int | None = None  # bytes of the 28 px file; None: unknown
    dims: Literal[2, 3] = 2  # 3: volumes
    md5: dict[int, str]  # by image size


class _MedMnist(_Entry):
    layout: str
    patients: str
    citation: str
    page: str
    url: str
    sets: dict[str, _MedMnistSet]

    def dataset(self, name: str, side: int) -> Dataset:
        """One set with images of `side` pixels."""
        entry, is_smallest = self.sets[name], side == SIDES[0]
        num_images = sum(entry.num_images.values())
        url = self.url.format(name=variant_name(name, side))
        return Dataset(
            title=entry.title if is_smallest else f"{entry.title}, {side} px",
            layout=self.layout.format(sides=" × ".join([str(side)] * entry.dims)),
            classes=CLASSES[name],
            splits=", ".join(f"{split} {count}" for split, count in entry.num_images.items()),
            patients=self.patients,
            license=entry.license,
            citation=self.citation,
            num_images=num_images,
            # before compression
            size=entry.size if is_smallest and entry.size else num_images * side**entry.dims * entry.channels,
            source=Web(page=self.page, files=(WebFile(url=url, md5=entry.md5[side]),)),
            variant_of=None if is_smallest else name,
        )


class _Catalog(_Entry):
    datasets: dict[str, Dataset]
    medmnist: _MedMnist


@cache
def load() -> dict[str, Dataset]:
    """All datasets by name; a MedMNIST set is one dataset for each image size."""
    text = Path(__file__).with_name("catalog.yaml").read_text(encoding="utf-8")
    catalog = _Catalog.model_validate(YAML(typ="safe", pure=True).load(text))
    medmnist = {
        variant_name(name, side): catalog.medmnist.dataset(name, side)
        for name in catalog.medmnist.sets
        for side in catalog.medmnist.sets[name].md5
    }
    return catalog.datasets | medmnist


def variant_name(name: str, side: int) -> str:
    """Name of a MedMNIST set with images of `side` pixels, such as pneumoniamnist_64."""
    return name if side == SIDES[0] else f"{name}_{side}"


def find(name: str) -> Dataset:
    """The dataset of that name.

    Raises:
        UserError: the catalog has no such name; the message lists the names.
    """
    if name not in load():
        raise unknown_name("dataset", name, load())
    return load()[name]


def show() -> None:
    """Print the name, size and description of each dataset, one line each."""
    for name, dataset in load().items():
        if dataset.variant_of is None:
            print(f"{name:29}{dataset.num_images:>7,} images {_format_size(dataset.size):>8}  {dataset.title}")
    sizes = ", ".join(map(str, SIDES[1:]))
    say(f"MedMNIST sets also come in {sizes} px, volumes (…3d) in {SIDES[1]} px: pneumoniamnist_64 is one.")
    say("`medgen data list NAME` shows classes, licence and source; `medgen data fetch NAME` downloads one.")


def show_dataset(name: str) -> None:
    """Print all that the catalog knows of a dataset.

    Raises:
        UserError: the catalog has no such name; the message lists the names.
    """
    dataset = find(name)
    for heading, cell in zip(HEADINGS, _row(name, dataset), strict=True):
        print(f"{heading + ':':15}{cell}")
    print(f"{'page:':15}{dataset.source.page}")


def to_markdown() -> str:
    """The table of docs/data.md."""
    rows = [list(HEADINGS), ["---"] * len(HEADINGS)]
    for row in _rows():
        name, source = row[0], row[-1]
        rows.append([f"`{name}`", *row[1:-1], f"[{source}]({find(name).source.page})"])
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def _rows() -> list[list[str]]:
    """Cells under HEADINGS, one row per dataset; the larger MedMNIST sizes are left out."""
    return [_row(name, dataset) for name, dataset in load().items() if dataset.variant_of is None]


def _row(name: str, dataset: Dataset) -> list[str]:
    sources = {"kaggle": "Kaggle", "web": "web", "manual": "manual download"}
    return [
        name,
        dataset.title,
        dataset.layout,
        _join_class_names(dataset.classes),
        dataset.splits,
        dataset.patients,
        dataset.license,
        dataset.citation,
        str(dataset.num_images),
        f"about {_format_size(dataset.size)}",
        sources[dataset.source.kind],
    ]


def _join_class_names(names: Sequence[str]) -> str:
    if len(names) > 15:
        return f"{len(names)} ({names[0]}, … {names[-1]})"
    return "; ".join(names) or "unlabelled"


def _format_size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"
