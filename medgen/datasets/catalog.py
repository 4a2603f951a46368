"""Datasets known by name: what is in each, whose it is, what it may be used for and where it comes from.

medgen data list
medgen data fetch pneumoniamnist
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Column, Table

from medgen.config import unknown_name
from medgen.ingest.formats.medmnist import CLASSES, SIDES

_LARGER = ", ".join(map(str, SIDES[1:]))


@dataclass(frozen=True)
class Kaggle:
    """A dataset that Kaggle gives, to whom it knows or to anyone, as its owner wished."""

    handle: str  # owner/dataset/versions/number: another version would be another dataset
    inside: str = ""  # the folder of the download that holds the pictures

    @property
    def page(self) -> str:
        """Where a browser gets it."""
        return "https://www.kaggle.com/datasets/" + "/".join(self.handle.split("/")[:2])


@dataclass(frozen=True)
class Torchvision:
    """A class of torchvision.datasets: it knows the addresses, the mirrors and the MD5 sums."""

    name: str
    page: str


@dataclass(frozen=True)
class Web:
    """Files that anyone may get."""

    page: str
    files: tuple[tuple[str, str | None], ...]  # address and checksum, as data/download.py takes it


@dataclass(frozen=True)
class ByHand:
    """What its owner gives after a form was filled in or a course was joined."""

    page: str
    steps: str  # what to do there, and which files to take


@dataclass(frozen=True)
class Dataset:
    """One known dataset."""

    title: str
    layout: str
    classes: tuple[str, ...]  # by their number where the files hold numbers; empty: unlabelled
    splits: str  # its own, or none
    patients: str  # where the patient of a picture is read
    license: str
    citation: str
    num_images: int
    size: int  # bytes to download, about
    source: Kaggle | Torchvision | Web | ByHand
    variant_of: str | None = None  # the same pictures in another size: one row with it in the table


@dataclass(frozen=True)
class _MedMnist:
    title: str
    num_images: tuple[int, int, int]  # train, val, test
    channels: int
    license: str
    size: int  # bytes of the file of 28 px
    md5: tuple[str, ...]  # of the files of 28, 64, 128 and 224 px


# medmnist 3.0.2, info.py; sizes are rounded
_MEDMNIST = {
    "pathmnist": _MedMnist(
        "PathMNIST: colon pathology, colour",
        (89_996, 10_004, 7_180),
        3,
        "CC BY 4.0",
        206_000_000,
        (
            "a8b06965200029087d5bd730944a56c1",
            "55aa9c1e0525abe5a6b9d8343a507616",
            "ac42d08fb904d92c244187169d1fd1d9",
            "2c51a510bcdc9cf8ddb2af93af1eadec",
        ),
    ),
    "chestmnist": _MedMnist(
        "ChestMNIST: chest X-rays; several findings at once, so read as unlabelled",
        (78_468, 11_219, 22_433),
        1,
        "CC BY 4.0",
        83_000_000,
        (
            "02c8a6516a18b556561a56cbdd36c4a8",
            "9de6cd0b934ebb5b7426cfba5efbae16",
            "db107e5590b27930b62dbaf558aebee3",
            "45bd33e6f06c3e8cdb481c74a89152aa",
        ),
    ),
    "dermamnist": _MedMnist(
        "DermaMNIST: dermatoscope, colour",
        (7_007, 1_003, 2_005),
        3,
        "CC BY-NC 4.0",
        20_000_000,
        (
            "0744692d530f8e62ec473284d019b0c7",
            "b70a2f5635c6199aeaa28c31d7202e1f",
            "2defd784463fa5243564e855ed717de1",
            "8974907d8e169bef5f5b96bc506ae45d",
        ),
    ),
    "octmnist": _MedMnist(
        "OCTMNIST: retinal OCT",
        (97_477, 10_832, 1_000),
        1,
        "CC BY 4.0",
        55_000_000,
        (
            "c68d92d5b585d8d81f7112f81e2d0842",
            "e229e9440236b774d9f0dfef9d07bdaf",
            "0a97e76651ace45c5d943ee3f65b63ae",
            "abc493b6d529d5de7569faaef2773ba3",
        ),
    ),
    "pneumoniamnist": _MedMnist(
        "PneumoniaMNIST: children's chest X-rays",
        (4_708, 524, 624),
        1,
        "CC BY 4.0",
        4_200_000,
        (
            "28209eda62fecd6e6a2d98b1501bb15f",
            "8f4eceb4ccffa70c672198ea285246c6",
            "05b46931834c231683c68f40c47b2971",
            "d6a3c71de1b945ea11211b03746c1fe1",
        ),
    ),
    "retinamnist": _MedMnist(
        "RetinaMNIST: fundus, colour",
        (1_080, 120, 400),
        3,
        "CC BY 4.0",
        3_300_000,
        (
            "bd4c0672f1bba3e3a89f0e4e876791e4",
            "afda852cc34dcda56f86ad2b2457dbcc",
            "e48e916a24454daf90583d4e6efb1a18",
            "eae7e3b6f3fcbda4ae613ebdcbe35348",
        ),
    ),
    "breastmnist": _MedMnist(
        "BreastMNIST: breast ultrasound",
        (546, 78, 156),
        1,
        "CC BY 4.0",
        600_000,
        (
            "750601b1f35ba3300ea97c75c52ff8f6",
            "742edef2a1fd1524b2efff4bd7ba9364",
            "363e4b3f8d712e9b5de15470a2aaadf1",
            "b56378a6eefa9fed602bb16d192d4c8b",
        ),
    ),
    "bloodmnist": _MedMnist(
        "BloodMNIST: blood cells, colour",
        (11_959, 1_712, 3_421),
        3,
        "CC BY 4.0",
        35_000_000,
        (
            "7053d0359d879ad8a5505303e11de1dc",
            "2b94928a2ae4916078ca51e05b6b800b",
            "adace1e0ed228fccda1f39692059dd4c",
            "b718ff6835fcbdb22ba9eacccd7b2601",
        ),
    ),
    "tissuemnist": _MedMnist(
        "TissueMNIST: kidney cortex cells",
        (165_466, 23_640, 47_280),
        1,
        "CC BY 4.0",
        125_000_000,
        (
            "ebe78ee8b05294063de985d821c1c34b",
            "123ece2eba09d0aa5d698fda57103344",
            "61b955355d7425a89687b06cca3ce0c2",
            "b077128c4a949f0a4eb01517f9037b9c",
        ),
    ),
    "organamnist": _MedMnist(
        "OrganAMNIST: abdominal CT, axial",
        (34_561, 6_491, 17_778),
        1,
        "CC BY 4.0",
        38_000_000,
        (
            "68e3f8846a6bd62f0c9bf841c0d9eacc",
            "2dcccc29b88e6da5a01161ef20cda288",
            "eeae80d0a227a8d099027e1b3cfd3b60",
            "50747347e05c87dd3aaf92c49f9f3170",
        ),
    ),
    "organcmnist": _MedMnist(
        "OrganCMNIST: abdominal CT, coronal",
        (12_975, 2_392, 8_216),
        1,
        "CC BY 4.0",
        16_000_000,
        (
            "b9ceb9546e10131b32923c5bbeaea2b1",
            "3ce34a8724ea6f548e6db4744d03b6a9",
            "773c1f009daa3fe5d9a2a201b2a7ed94",
            "050f5e875dc056f6768abf94ec9995d1",
        ),
    ),
    "organsmnist": _MedMnist(
        "OrganSMNIST: abdominal CT, sagittal",
        (13_932, 2_452, 8_827),
        1,
        "CC BY 4.0",
        17_000_000,
        (
            "9ab87b696fb54e2a387ebe992d6ed5f1",
            "53a6d115339d874c25e309a994ff46d3",
            "ded0c5fa01a95dc4978b956f613e9b8e",
            "b354719e553fbbb2513d5533f52a4cb1",
        ),
    ),
}


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(" | "))


def _medmnist(name: str, side: int) -> Dataset:
    known = _MEDMNIST[name]
    stem = name if side == 28 else f"{name}_{side}"
    train, val, test = known.num_images
    num_images = train + val + test
    return Dataset(
        title=known.title if side == 28 else f"{known.title}, {side} px",
        layout=f"one .npz of train, val and test arrays, {side} × {side}",
        classes=CLASSES[name],
        splits=f"train {train}, val {val}, test {test}",
        patients="not in the file: each picture counts as its own",
        license=known.license,
        citation="Yang et al., MedMNIST v2, Scientific Data 10:41, 2023, doi:10.1038/s41597-022-01721-8",
        num_images=num_images,
        size=known.size if side == 28 else num_images * side * side * known.channels,  # packed, it is less
        source=Web(
            page="https://doi.org/10.5281/zenodo.10519652",
            files=(
                (
                    f"https://zenodo.org/records/10519652/files/{stem}.npz?download=1",
                    f"md5:{known.md5[SIDES.index(side)]}",
                ),
            ),
        ),
        variant_of=None if side == 28 else name,
    )


_NLM = "Jaeger et al., Quantitative Imaging in Medicine and Surgery 4(6):475-477, 2014"
_NLM_PAGE = "https://data.lhncbc.nlm.nih.gov/public/Tuberculosis-Chest-X-ray-Datasets/"
_NLM_LICENSE = "free to use; name the source and cite"
_OASIS = "Marcus et al., Journal of Cognitive Neuroscience 19(9):1498-1507, 2007"

KNOWN: dict[str, Dataset] = {
    "chest-xray-pneumonia": Dataset(
        title="children's chest X-rays (Kermany), as on Kaggle",
        layout="chest_xray/SPLIT/CLASS/file.jpeg; the download holds it twice, one is taken",
        classes=("NORMAL", "PNEUMONIA"),
        splits="train 5216, val 16, test 624",
        patients="personN_… and IM-NNNN-… in the file name",
        license="CC BY 4.0",
        citation="Kermany et al., Cell 172(5):1122-1131, 2018; Mendeley Data, doi:10.17632/rscbjbr9sj.2",
        num_images=5856,
        size=2_460_000_000,
        source=Kaggle("paultimothymooney/chest-xray-pneumonia/versions/2", inside="chest_xray/chest_xray"),
    ),
    "chest-xray-covid19-pneumonia": Dataset(
        title="chest X-rays in three classes, collected by P. Patel",
        layout="Data/SPLIT/CLASS/file.jpg",
        classes=("COVID19", "NORMAL", "PNEUMONIA"),
        splits="train 5144, test 1288",
        patients="lost by its collector: files are numbered, each counts as its own; run `medgen data audit`",
        license="none stated; the collected sets keep theirs",
        citation="Patel, Chest X-ray (Covid-19 & Pneumonia), Kaggle, 2020",
        num_images=6432,
        size=2_200_000_000,
        source=Kaggle("prashant268/chest-xray-covid19-pneumonia/versions/2", inside="Data"),
    ),
    "oasis-slices": Dataset(
        title="brain MRI slices of OASIS-1 with tissue masks, 256 px",
        layout="keras_png_slices_{train,validate,test} beside keras_png_slices_seg_…; case_NNN_slice_K.nii.png",
        classes=(),
        splits="train 9664, val 1120, test 544",
        patients="case_NNN in the file name",
        license="OASIS data use terms",
        citation=_OASIS,
        num_images=11328,
        size=250_000_000,
        source=ByHand(
            page="https://sites.wustl.edu/oasisbrains/",
            steps="It is handed out by the courses that use it; its source is OASIS-1, whose data use terms hold. "
            "Take the zip with the folders keras_png_slices_train, _validate, _test and keras_png_slices_seg_…",
        ),
    ),
    "oasis1-volumes": Dataset(
        title="brain MRI volumes of OASIS-1, skull-stripped, in atlas space",
        layout="Analyze pairs OAS1_NNNN_MRn_…_t88_masked_gfc.hdr and .img; the discs' other files are left out",
        classes=(),
        splits="none",
        patients="OAS1_NNNN in the file name; the second scan of a subject stays with the first",
        license="OASIS data use terms",
        citation=_OASIS,
        num_images=436,
        size=15_800_000_000,
        source=ByHand(
            page="https://sites.wustl.edu/oasisbrains/home/oasis-1/",
            steps="Ask for access there, accept the data use terms, and take oasis_cross-sectional_disc1.tar.gz to "
            "oasis_cross-sectional_disc12.tar.gz, or as many of them as you want",
        ),
    ),
    "mnist": Dataset(
        title="handwritten digits",
        layout="IDX: train-images-idx3-ubyte.gz, its labels, and t10k",
        classes=tuple("0123456789"),
        splits="train 60000, test 10000",
        patients="none: each digit counts as its own",
        license="CC BY-SA 3.0",
        citation="LeCun, Bottou, Bengio, Haffner, Proceedings of the IEEE 86(11):2278-2324, 1998",
        num_images=70_000,
        size=11_600_000,
        source=Torchvision("MNIST", page="https://ossci-datasets.s3.amazonaws.com/mnist/"),
    ),
    "cifar10": Dataset(
        title="small colour photographs",
        layout="cifar-10-batches-py: five training batches and one test batch",
        classes=_names("airplane | automobile | bird | cat | deer | dog | frog | horse | ship | truck"),
        splits="train 50000, test 10000",
        patients="none: each picture counts as its own",
        license="none stated; cite",
        citation="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        num_images=60_000,
        size=170_500_000,
        source=Torchvision("CIFAR10", page="https://www.cs.toronto.edu/~kriz/cifar.html"),
    ),
    "oxford-pet": Dataset(
        title="cats and dogs of 37 breeds with outlines as masks, colour",
        layout="images/BREED_N.jpg, trimaps as masks (ground 0, border 127, pet 255), manifest.csv",
        classes=_names(
            "Abyssinian | american_bulldog | american_pit_bull_terrier | basset_hound | beagle | Bengal | "
            "Birman | Bombay | boxer | British_Shorthair | chihuahua | Egyptian_Mau | "
            "english_cocker_spaniel | english_setter | german_shorthaired | great_pyrenees | havanese | "
            "japanese_chin | keeshond | leonberger | Maine_Coon | miniature_pinscher | newfoundland | "
            "Persian | pomeranian | pug | Ragdoll | Russian_Blue | saint_bernard | samoyed | "
            "scottish_terrier | shiba_inu | Siamese | Sphynx | staffordshire_bull_terrier | "
            "wheaten_terrier | yorkshire_terrier"
        ),
        splits="train 3680, test 3669",
        patients="none: each picture counts as its own",
        license="CC BY-SA 4.0",
        citation="Parkhi, Vedaldi, Zisserman, Jawahar, Cats and Dogs, CVPR 2012",
        num_images=7349,
        size=811_000_000,
        source=Torchvision("OxfordIIITPet", page="https://www.robots.ox.ac.uk/~vgg/data/pets/"),
    ),
    "montgomery": Dataset(
        title="chest X-rays for tuberculosis with lung masks, Montgomery County",
        layout="MCUCXR_NNNN_[01].png, left and right masks joined, manifest.csv",
        classes=("normal", "tuberculosis"),
        splits="none",
        patients="MCUCXR_NNNN in the file name: one film each",
        license=_NLM_LICENSE,
        citation=_NLM,
        num_images=138,
        size=617_000_000,
        source=Web(
            page=_NLM_PAGE,
            files=(("https://openi.nlm.nih.gov/imgs/collections/NLM-MontgomeryCXRSet.zip", None),),
        ),
    ),
    "shenzhen": Dataset(
        title="chest X-rays for tuberculosis, Shenzhen No. 3 Hospital",
        layout="CHNCXR_NNNN_[01].png, manifest.csv; no masks",
        classes=("normal", "tuberculosis"),
        splits="none",
        patients="CHNCXR_NNNN in the file name: one film each",
        license=_NLM_LICENSE,
        citation=_NLM,
        num_images=662,
        size=3_770_000_000,
        source=Web(
            page=_NLM_PAGE,
            files=(("https://openi.nlm.nih.gov/imgs/collections/ChinaSet_AllFiles.zip", None),),
        ),
    ),
    "openist": Dataset(
        title="chest X-rays with lung masks, OpenIST",
        layout="N-M-500-500-100.jpg, mask N-M-500-500-100@.png",
        classes=(),
        splits="none",
        patients="not known: each picture counts as its own",
        license="none stated: do not hand it on",
        citation="OpenIST, https://github.com/pi-null-mezon/OpenIST, Datasets/Chest_x-ray",
        num_images=219,
        size=100_000_000,
        source=Web(
            page="https://github.com/pi-null-mezon/OpenIST",
            files=(("https://github.com/pi-null-mezon/OpenIST/archive/refs/heads/master.zip", None),),
        ),
    ),
    **{name if side == 28 else f"{name}_{side}": _medmnist(name, side) for name in _MEDMNIST for side in SIDES},
}


def find(name: str) -> Dataset:
    """A known dataset.

    Raises:
        UserError: there is none of that name; lists the known ones.
    """
    if name not in KNOWN:
        raise unknown_name("dataset", name, KNOWN)
    return KNOWN[name]


def show() -> None:
    """Prints the known datasets."""
    head, *rows = _rows()
    table = Table(Column(head[0], no_wrap=True), "what it is", show_lines=True)
    for name, title, *cells in rows:
        table.add_row(name, "\n".join([title, *(f"{key}: {cell}" for key, cell in zip(head[2:], cells, strict=True))]))
    console = Console()
    console.print(table)
    console.print(f"MedMNIST sets also come larger, as pneumoniamnist_64: {_LARGER} px", highlight=False)
    console.print("medgen data fetch NAME makes one this project's data", highlight=False)


def to_markdown() -> str:
    """The table of docs/data.md."""
    head, *rows = _rows()
    for row, dataset in zip(rows, _listed().values(), strict=True):
        row[0], row[-1] = f"`{row[0]}`", f"[{row[-1]}]({dataset.source.page})"
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _listed() -> dict[str, Dataset]:
    return {name: dataset for name, dataset in KNOWN.items() if dataset.variant_of is None}


def _rows() -> list[list[str]]:
    """The head, and one row for each dataset; the sizes of one set together."""
    head = [
        "name", "what", "layout", "classes", "splits", "patient", "licence", "citation", "images", "download", "from",
    ]  # fmt: skip
    ways = {Kaggle: "Kaggle", Torchvision: "torchvision", Web: "web", ByHand: "by hand"}
    return [
        head,
        *(
            [
                name,
                dataset.title,
                dataset.layout,
                _name_classes(dataset.classes),
                dataset.splits,
                dataset.patients,
                dataset.license,
                dataset.citation,
                str(dataset.num_images),
                f"about {_describe_size(dataset.size)}",
                ways[type(dataset.source)],
            ]
            for name, dataset in _listed().items()
        ),
    ]


def _name_classes(names: Sequence[str]) -> str:
    if len(names) > 15:
        return f"{len(names)} ({names[0]}, … {names[-1]})"
    return "; ".join(names) or "unlabelled"


def _describe_size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"
