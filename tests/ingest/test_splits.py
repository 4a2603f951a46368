"""Splits: no patient in two splits, every label in proportion, independent of file order."""

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from medgen.ingest.dataset_scan import ImageRecord
from medgen.ingest.splits import assign_splits, group_patients, unify_splits


def make(num_patients: int, labels: str = "ABC", seed: int = 0, split: str | None = None) -> list[ImageRecord]:
    """Patients with 1 to 3 images each; the seed is part of their names."""
    draw = random.Random(seed)
    records = []
    for number in range(num_patients):
        label = draw.choice(labels)
        for image in range(draw.randint(1, 3)):
            records.append(ImageRecord(f"{seed}/{number}-{image}.png", label, f"{seed}/{number}", split, None))
    return records


def record(path: str, patient: str, split: str | None = None, label: str = "A") -> ImageRecord:
    return ImageRecord(path, label, patient, split, None)


def leaks(records: Sequence[ImageRecord], names: Sequence[str]) -> set[str]:
    seen: dict[str, str] = {}
    pairs = zip(records, names, strict=True)
    return {record.patient for record, name in pairs if seen.setdefault(record.patient, name) != name}


@pytest.mark.parametrize("seed", range(60))
def test_no_patient_is_in_two_splits(seed: int) -> None:
    draw = random.Random(seed)
    records = make(draw.randint(1, 80), "AB", seed)
    mixed = [record(f"m{i}", f"many-{draw.randint(0, 9)}", label=draw.choice("ABC")) for i in range(40)]
    given = make(10, "AB", seed + 1000, split=draw.choice(["train", "val", "test"]))
    everything = records + mixed + given
    names = assign_splits(everything, draw.choice([0.0, 0.1, 0.3]), draw.choice([0.0, 0.2, 0.4]), seed)
    assert len(names) == len(everything)
    assert set(names) <= {"train", "val", "test"}
    assert not leaks(everything, names)


@pytest.mark.parametrize("seed", range(10))
def test_every_label_has_its_share_of_each_split(seed: int) -> None:
    records = make(300, "ABC", seed)
    names = assign_splits(records, 0.1, 0.2, seed)
    total = Counter(record.label for record in records)
    found = Counter((record.label, name) for record, name in zip(records, names, strict=True))
    for label, number in total.items():
        assert abs(found[label, "test"] - 0.2 * number) <= 0.25 * 0.2 * number + 3  # a patient has up to 3 images
        assert abs(found[label, "val"] - 0.1 * number) <= 0.25 * 0.1 * number + 3


def test_a_rare_label_is_in_every_split() -> None:
    records = make(100, "A") + [record(f"r{i}", f"r{i}", label="rare") for i in range(4)]
    names = assign_splits(records, 0.05, 0.1, 0)
    assert set(names[-4:]) == {"train", "val", "test"}


def test_a_patient_with_most_images_stays_in_train() -> None:
    records = [record(f"b{i}", "big") for i in range(100)] + [record(f"s{i}", f"s{i}") for i in range(20)]
    for seed in range(20):
        names = assign_splits(records, 0.1, 0.2, seed)
        assert set(names[:100]) == {"train"}
        assert Counter(names)["test"] > 0


def test_splits_depend_on_the_seed_and_not_on_the_order_of_records() -> None:
    records = make(100)
    names = dict(zip([r.path for r in records], assign_splits(records, 0.1, 0.2, 7), strict=True))
    shuffled = random.Random(1).sample(records, len(records))
    assert dict(zip([r.path for r in shuffled], assign_splits(shuffled, 0.1, 0.2, 7), strict=True)) == names
    assert assign_splits(records, 0.1, 0.2, 1) == assign_splits(records, 0.1, 0.2, 1)
    assert assign_splits(records, 0.1, 0.2, 1) != assign_splits(records, 0.1, 0.2, 2)


@pytest.mark.parametrize("seed", range(5))
def test_added_files_change_no_split_in_a_large_dataset(seed: int) -> None:
    before, added = make(3000, seed=seed), make(1000, seed=seed + 100)
    names = assign_splits(before, 0.1, 0.2, 0)
    assert assign_splits(added + before, 0.1, 0.2, 0)[len(added) :] == names


def test_added_files_change_few_splits_in_a_small_dataset() -> None:
    for seed in range(10):
        before, added = make(60, seed=seed), make(6, seed=seed + 100)
        names = assign_splits(before, 0.1, 0.2, 0)
        after = assign_splits(before + added, 0.1, 0.2, 0)[: len(before)]
        moved = sum(a != b for a, b in zip(names, after, strict=True))
        assert moved <= 0.12 * len(before)  # independent random splits would move about 0.45 of them


def test_grouped_patients_are_in_one_split() -> None:
    records = make(100, seed=0)
    rows = [next(i for i, record in enumerate(records) if record.patient == f"0/{number}") for number in range(0, 60)]
    pairs = [(rows[i], rows[i + 1]) for i in range(0, 60, 2)]
    groups = group_patients(records, pairs)
    assert group_patients(records, [(b, a) for a, b in reversed(pairs)]) == groups
    for seed in range(20):
        names = assign_splits(records, 0.1, 0.2, seed, groups)
        assert all(names[first] == names[second] for first, second in pairs)
        assert set(names) == {"train", "val", "test"}


def test_chains_of_pairs_are_one_group() -> None:
    records = [record(f"{i}.png", f"{i:02}") for i in range(10)]
    assert group_patients(records, [(8, 9), (2, 1), (9, 2), (5, 6)]) == [
        "00", "01", "01", "03", "04", "05", "05", "07", "01", "01",
    ]  # fmt: skip


def test_unify_moves_a_group_to_the_split_with_most_of_it() -> None:
    rows = [("p", "train"), ("p", "train"), ("p", "test"), ("q", "train"), ("q", "test"), ("r", "val"), ("r", None)]
    records = [record(f"{i}.png", patient, split) for i, (patient, split) in enumerate(rows)]
    united = unify_splits(records, [record.patient for record in records])
    assert [record.split for record in united] == ["train", "train", "train", "test", "test", "val", None]


def test_a_given_test_split_is_kept_and_val_is_drawn_from_train() -> None:
    records = make(100, seed=0, split="train") + make(40, seed=1, split="test")
    names = assign_splits(records, 0.1, 0.2, 0)
    assert all(
        name == "test" if record.split == "test" else name in ("train", "val")
        for record, name in zip(records, names, strict=True)
    )
    num_train = sum(record.split == "train" for record in records)
    assert abs(Counter(names)["val"] - 0.1 * num_train) <= 3


def test_three_given_splits_are_unchanged() -> None:
    records = [r for seed, split in enumerate(("train", "val", "test")) for r in make(20, seed=seed, split=split)]
    assert assign_splits(records, 0.1, 0.2, 0) == [record.split for record in records]


def test_with_a_given_val_split_test_is_drawn_from_train() -> None:
    train, val = make(100, seed=0, split="train"), make(10, seed=1, split="val")
    names = assign_splits(train + val, 0.1, 0.2, 0)
    assert Counter(names)["test"] > 0
    assert names[len(train) :] == ["val"] * len(val)


def test_a_patient_in_two_given_splits_is_not_moved() -> None:
    records = make(50, seed=0, split="train") + [record("a", "p", "train"), record("b", "p", "test"), record("c", "p")]
    for seed in range(20):
        names = assign_splits(records, 0.5, 0.2, seed)
        assert names[-3:-1] == ["train", "test"]  # and never val: its test image is not moved
        assert names[-1] in ("train", "test")


def test_images_without_a_split_follow_their_patient_or_train() -> None:
    given, new = make(20, seed=0, split="test"), make(20, seed=1)
    names = assign_splits([*given, *new, record("late.png", given[0].patient)], 0.1, 0.2, 0)
    assert names[-1] == "test"
    assert set(names[len(given) : -1]) == {"train", "val"}


def test_fraction_0_leaves_everything_in_train() -> None:
    assert set(assign_splits(make(30), 0.0, 0.0, 0)) == {"train"}
