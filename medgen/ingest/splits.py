"""Assign images to train, val and test: by patient, stratified by label, reproducible from the seed."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from medgen.ingest.dataset_scan import ImageRecord

_TOLERANCE = 0.25  # largest relative deviation of a label's share of a split from the requested fraction
_PRECEDENCE = ("test", "val", "train")  # preferred split of a group that is in several, so that evaluation stays clean


def assign_splits(
    records: Sequence[ImageRecord],
    val_fraction: float,
    test_fraction: float,
    seed: int,
    groups: Sequence[str] | None = None,
) -> list[str]:
    """Split of each record: "train", "val" or "test".

    Splits that the dataset defines are kept. The others are drawn from its training images and those without a split,
    by whole groups. A group is a patient, unless `groups` (one name per record) joins patients that share an image. A
    group is drawn if the hash of seed and name, a number in [0, 1), is below the fraction: the order of files does not
    matter, and new patients do not move others. If that gives a label less than 3/4 or more than 5/4 of its share, as
    in small datasets, groups with the nearest hashes are added or left out; new patients can move these.
    """
    groups = [record.group or record.patient for record in records] if groups is None else groups
    given = _count_splits(records, groups)
    present = {split for splits in given.values() for split in splits}

    pool: dict[str, list[ImageRecord]] = defaultdict(list)  # groups that may be moved out of train
    for group, record in zip(groups, records, strict=True):
        if set(given.get(group, ())) <= {"train"}:
            pool[group].append(record)
    chosen = dict.fromkeys(pool, "train")
    for split, fraction in (("test", test_fraction), ("val", val_fraction)):
        if split not in present:
            rest = {group: pool[group] for group in pool if chosen[group] == "train"}
            kept = 1.0 if split == "test" or "test" in present else 1.0 - test_fraction  # fractions are of the whole
            chosen.update(dict.fromkeys(_draw_groups(rest, min(fraction / kept, 1.0), f"{seed}/{split}"), split))

    # Images without a split follow the other images of their group; given splits are kept.
    main = {group: _main_split(splits) for group, splits in given.items()}
    return [chosen.get(group) or record.split or main[group] for group, record in zip(groups, records, strict=True)]


def unify_splits(records: Sequence[ImageRecord], groups: Sequence[str]) -> list[ImageRecord]:
    """Records with each group moved into the split that has most of its images; in a tie, test before val, then train.

    Records without a split are left unchanged.
    """
    given = _count_splits(records, groups)
    moved = {group: _main_split(splits) for group, splits in given.items() if len(splits) > 1}
    return [
        replace(record, split=moved[group]) if group in moved and record.split is not None else record
        for group, record in zip(groups, records, strict=True)
    ]


def group_patients(records: Sequence[ImageRecord], pairs: Iterable[tuple[int, int]]) -> list[str]:
    """A group name per record. Patients are in one group if a pair of rows shows the same image (union-find)."""
    names = [record.group or record.patient for record in records]
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        while (above := parent.get(name, name)) != name:
            parent[name] = name = parent.get(above, above)
        return name

    for first, second in pairs:
        low, high = sorted((find(names[first]), find(names[second])))
        parent[high] = low  # the smallest name is the root, so that the order of pairs does not matter
    return [find(name) for name in names]


def _count_splits(records: Sequence[ImageRecord], groups: Sequence[str]) -> Mapping[str, Counter[str]]:
    """Number of images per given split of each group that has any."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for group, record in zip(groups, records, strict=True):
        if record.split is not None:
            counts[group][record.split] += 1
    return counts


def _main_split(splits: Counter[str]) -> str:
    return min(splits, key=lambda split: (-splits[split], _PRECEDENCE.index(split)))


def _draw_groups(pool: Mapping[str, Sequence[ImageRecord]], fraction: float, salt: str) -> Iterator[str]:
    """Groups that together contain about `fraction` of each label's images."""
    if fraction <= 0:
        return
    strata: dict[str, list[str]] = defaultdict(list)
    for group, records in pool.items():
        strata[_main_label(records)].append(group)
    for members in strata.values():
        target = fraction * sum(len(pool[group]) for group in members)
        least, most = (1 - _TOLERANCE) * target, (1 + _TOLERANCE) * target
        ranked = sorted((_rank(group, salt), group) for group in members)
        taken: list[str] = []
        num_images = 0
        for rank, group in ranked:
            wanted = rank < fraction or num_images < least
            fits = num_images + len(pool[group]) <= max(most, 1)
            if wanted and fits and len(taken) < len(ranked) - 1:
                taken.append(group)
                num_images += len(pool[group])
        if not taken and len(ranked) > 2:  # every split gets a rare label
            taken = [min(members, key=lambda group: (len(pool[group]), _rank(group, salt)))]
        yield from taken


def _main_label(records: Sequence[ImageRecord]) -> str:
    """The most common label of a group: a group with several labels is in one stratum only."""
    counts = Counter(record.label or "" for record in records)
    return min(counts, key=lambda label: (-counts[label], label))


def _rank(group: str, salt: str) -> float:
    digest = hashlib.sha256(f"{salt}/{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
