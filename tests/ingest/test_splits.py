"""Splits never share a patient, hold every label's share, and do not depend on order."""

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from medgen.ingest.dataset_scan import Record
from medgen.ingest.splits import assign, join, unite


def make(num_patients: int, labels: str = "ABC", seed: int = 0, split: str | None = None) -> list[Record]:
    """Patients with 1 to 3 images each, named apart from those of another seed."""
    draw = random.Random(seed)
    records = []
    for number in range(num_patients):
        label = draw.choice(labels)
        for image in range(draw.randint(1, 3)):
            records.append(Record(f"{seed}/{number}-{image}.png", label, f"{seed}/{number}", split, None))
    return records


def leaks(records: Sequence[Record], names: Sequence[str]) -> set[str]:
    seen: dict[str, str] = {}
    pairs = zip(records, names, strict=True)
    return {record.patient for record, name in pairs if seen.setdefault(record.patient, name) != name}


@pytest.mark.parametrize("seed", range(60))
def test_no_patient_is_in_two_splits(seed: int) -> None:
    draw = random.Random(seed)
    records = make(draw.randint(1, 80), "AB", seed)
    mixed = [Record(f"m{i}", draw.choice("ABC"), f"many-{draw.randint(0, 9)}", None, None) for i in range(40)]
    given = make(10, "AB", seed + 1000, split=draw.choice(["train", "val", "test"]))
    everything = records + mixed + given
    names = assign(everything, draw.choice([0.0, 0.1, 0.3]), draw.choice([0.0, 0.2, 0.4]), seed)
    assert len(names) == len(everything)
    assert set(names) <= {"train", "val", "test"}
    assert not leaks(everything, names)


@pytest.mark.parametrize("seed", range(10))
def test_every_label_has_its_share(seed: int) -> None:
    records = make(300, "ABC", seed)
    names = assign(records, 0.1, 0.2, seed)
    total = Counter(record.label for record in records)
    found = Counter((record.label, name) for record, name in zip(records, names, strict=True))
    for label, number in total.items():
        assert abs(found[label, "test"] - 0.2 * number) <= 0.25 * 0.2 * number + 3  # a patient has up to 3 images
        assert abs(found[label, "val"] - 0.1 * number) <= 0.25 * 0.1 * number + 3


def test_a_rare_label_is_in_every_split() -> None:
    records = make(100, "A") + [Record(f"r{i}", "rare", f"r{i}", None, None) for i in range(4)]
    names = assign(records, 0.05, 0.1, 0)
    assert {name for record, name in zip(records, names, strict=True) if record.label == "rare"} == {
        "train", "val", "test",
    }  # fmt: skip


def test_one_patient_with_most_images_stays_in_train() -> None:
    big = [Record(f"b{i}", "A", "big", None, None) for i in range(100)]
    records = big + [Record(f"s{i}", "A", f"s{i}", None, None) for i in range(20)]
    for seed in range(20):
        names = assign(records, 0.1, 0.2, seed)
        assert set(names[:100]) == {"train"}
        assert Counter(names)["test"] > 0


def test_the_order_of_records_does_not_matter() -> None:
    records = make(100)
    names = dict(zip([r.path for r in records], assign(records, 0.1, 0.2, 7), strict=True))
    shuffled = random.Random(1).sample(records, len(records))
    assert dict(zip([r.path for r in shuffled], assign(shuffled, 0.1, 0.2, 7), strict=True)) == names


def test_the_seed_decides() -> None:
    records = make(100)
    assert assign(records, 0.1, 0.2, 1) == assign(records, 0.1, 0.2, 1)
    assert assign(records, 0.1, 0.2, 1) != assign(records, 0.1, 0.2, 2)


@pytest.mark.parametrize("seed", range(5))
def test_adding_files_moves_nobody_in_a_large_set(seed: int) -> None:
    before, added = make(3000, seed=seed), make(1000, seed=seed + 100)
    names = assign(before, 0.1, 0.2, 0)
    assert assign(added + before, 0.1, 0.2, 0)[len(added) :] == names


def test_adding_files_moves_few_in_a_small_set() -> None:
    for seed in range(10):
        before, added = make(60, seed=seed), make(6, seed=seed + 100)
        names = assign(before, 0.1, 0.2, 0)
        after = assign(before + added, 0.1, 0.2, 0)[: len(before)]
        moved = sum(a != b for a, b in zip(names, after, strict=True))
        assert moved <= 0.12 * len(before)  # a fresh draw would move about 0.45 of them


def test_joined_patients_stay_together() -> None:
    records = make(100, seed=0)
    rows = [next(i for i, record in enumerate(records) if record.patient == f"0/{number}") for number in range(0, 60)]
    pairs = [(rows[i], rows[i + 1]) for i in range(0, 60, 2)]
    groups = join(records, pairs)
    assert join(records, [(b, a) for a, b in reversed(pairs)]) == groups
    for seed in range(20):
        names = assign(records, 0.1, 0.2, seed, groups)
        assert all(names[one] == names[other] for one, other in pairs)
        assert set(names) == {"train", "val", "test"}


def test_chains_are_joined_whole() -> None:
    records = [Record(f"{i}.png", "A", f"{i:02}", None, None) for i in range(10)]
    assert join(records, [(8, 9), (2, 1), (9, 2), (5, 6)]) == [
        "00", "01", "01", "03", "04", "05", "05", "07", "01", "01",
    ]  # fmt: skip


def test_unite_puts_each_group_where_most_of_it_is() -> None:
    rows = [("p", "train"), ("p", "train"), ("p", "test"), ("q", "train"), ("q", "test"), ("r", "val"), ("r", None)]
    records = [Record(f"{i}.png", "A", patient, split, None) for i, (patient, split) in enumerate(rows)]
    united = unite(records, [record.patient for record in records])
    assert [record.split for record in united] == ["train", "train", "train", "test", "test", "val", None]


def test_a_given_split_is_kept_and_val_is_cut_from_train() -> None:
    records = make(100, seed=0, split="train") + make(40, seed=1, split="test")
    names = assign(records, 0.1, 0.2, 0)
    assert all(
        name == "test" if record.split == "test" else name in ("train", "val")
        for record, name in zip(records, names, strict=True)
    )
    num_train = sum(record.split == "train" for record in records)
    assert abs(Counter(names)["val"] - 0.1 * num_train) <= 3


def test_three_given_splits_are_kept_as_they_are() -> None:
    records = [
        record for seed, split in enumerate(("train", "val", "test")) for record in make(20, seed=seed, split=split)
    ]
    assert assign(records, 0.1, 0.2, 0) == [record.split for record in records]


def test_a_given_val_leaves_test_to_be_cut() -> None:
    records = make(100, seed=0, split="train") + make(10, seed=1, split="val")
    names = assign(records, 0.1, 0.2, 0)
    assert Counter(names)["test"] > 0
    assert [name for record, name in zip(records, names, strict=True) if record.split == "val"] == ["val"] * sum(
        record.split == "val" for record in records
    )


def test_a_given_split_that_parts_a_patient_is_kept() -> None:
    records = make(50, seed=0, split="train") + [
        Record("a", "A", "p", "train", None), Record("b", "A", "p", "test", None), Record("c", "A", "p", None, None),
    ]  # fmt: skip
    for seed in range(20):
        names = assign(records, 0.5, 0.2, seed)
        assert names[-3:-1] == ["train", "test"]  # and never val: its test image is not moved
        assert names[-1] in ("train", "test")


def test_files_without_a_split_beside_given_ones_go_to_train_or_their_patient() -> None:
    records = make(20, seed=0, split="test") + make(20, seed=1)
    records.append(Record("late.png", "A", records[0].patient, None, None))
    names = assign(records, 0.1, 0.2, 0)
    assert names[-1] == "test"
    assert {name for record, name in zip(records, names, strict=True) if record.patient.startswith("1/")} == {
        "train", "val",
    }  # fmt: skip


def test_nothing_is_cut_at_fraction_0() -> None:
    assert set(assign(make(30), 0.0, 0.0, 0)) == {"train"}
