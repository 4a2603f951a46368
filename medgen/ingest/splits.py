"""Records -> train, val or test: by patient, in like shares of every label, the same for the same seed."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from medgen.ingest.dataset_scan import Record

_SLACK = 0.25  # a label's share of a split may differ from what was asked by this much of it
_PRECEDENCE = ("test", "val", "train")  # who keeps a picture that stands in two splits: the side that judges


def assign(
    records: Sequence[Record],
    val_fraction: float,
    test_fraction: float,
    seed: int,
    groups: Sequence[str] | None = None,
) -> list[str]:
    """Split of each record, "train", "val" or "test".

    A split the data brings is kept. One it does not bring is cut from the rest by whole groups: the patients, unless
    `groups` (one name for each record) joins some that share a picture. A group is cut when the hash of seed and name,
    a number in [0, 1), is below the fraction: so the order of files does not matter, and new patients move nobody.
    Only where chance would leave a label with less than 3/4 or more than 5/4 of its share, as in small sets, the
    hash's nearest neighbours are taken or left instead, and those can move.
    """
    groups = [record.patient for record in records] if groups is None else groups
    given: dict[str, Counter[str]] = defaultdict(Counter)  # group -> splits the data names
    for group, record in zip(groups, records, strict=True):
        if record.split is not None:
            given[group][record.split] += 1
    present = {split for splits in given.values() for split in splits}

    pool: dict[str, list[Record]] = defaultdict(list)  # groups that may still be moved out of train
    for group, record in zip(groups, records, strict=True):
        if set(given.get(group, ())) <= {"train"}:
            pool[group].append(record)
    chosen = dict.fromkeys(pool, "train")
    for split, fraction in (("test", test_fraction), ("val", val_fraction)):
        if split not in present:
            rest = {group: pool[group] for group in pool if chosen[group] == "train"}
            kept = 1.0 if split == "test" or "test" in present else 1.0 - test_fraction  # fractions are of the whole
            chosen.update(dict.fromkeys(_cut(rest, min(fraction / kept, 1.0), f"{seed}/{split}"), split))

    # A group's unnamed images follow its named ones; named ones stay where the data put them.
    leading = {group: _leading(splits) for group, splits in given.items()}
    return [chosen.get(group) or record.split or leading[group] for group, record in zip(groups, records, strict=True)]


def unite(records: Sequence[Record], groups: Sequence[str]) -> list[Record]:
    """Records with each group whole in one given split: the one that has most of it; on a tie, the one that judges."""
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for group, record in zip(groups, records, strict=True):
        if record.split is not None:
            given[group][record.split] += 1
    parted = {group: _leading(splits) for group, splits in given.items() if len(splits) > 1}
    return [
        replace(record, split=parted[group]) if group in parted and record.split is not None else record
        for group, record in zip(groups, records, strict=True)
    ]


def join(records: Sequence[Record], pairs: Iterable[tuple[int, int]]) -> list[str]:
    """A group's name for each record: patients, joined where a pair of rows says that they share a picture."""
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        while (above := parent.get(name, name)) != name:
            parent[name] = name = parent.get(above, above)
        return name

    for one, other in pairs:
        low, high = sorted((find(records[one].patient), find(records[other].patient)))
        parent[high] = low  # the smaller name leads, whatever the order of pairs
    return [find(record.patient) for record in records]


def _leading(splits: Counter[str]) -> str:
    return min(splits, key=lambda split: (-splits[split], _PRECEDENCE.index(split)))


def _cut(pool: dict[str, list[Record]], fraction: float, salt: str) -> Iterable[str]:
    """Groups that together hold about `fraction` of each label's images."""
    if fraction <= 0:
        return
    strata: dict[str, list[str]] = defaultdict(list)
    for group, records in pool.items():
        strata[_main_label(records)].append(group)
    for members in strata.values():
        asked = fraction * sum(len(pool[group]) for group in members)
        least, most = (1 - _SLACK) * asked, (1 + _SLACK) * asked
        ranked = sorted((_rank(group, salt), group) for group in members)
        taken: list[str] = []
        num_images = 0
        for rank, group in ranked:
            wanted = rank < fraction or num_images < least
            fits = num_images + len(pool[group]) <= max(most, 1)
            if wanted and fits and len(taken) < len(ranked) - 1:
                taken.append(group)
                num_images += len(pool[group])
        if not taken and len(ranked) > 2:  # so that a rare label is seen in every split
            taken = [min(members, key=lambda group: (len(pool[group]), _rank(group, salt)))]
        yield from taken


def _main_label(records: Sequence[Record]) -> str:
    """A group with several labels stands in one split all the same, counted under its commonest."""
    counts = Counter(record.label or "" for record in records)
    return min(counts, key=lambda label: (-counts[label], label))


def _rank(group: str, salt: str) -> float:
    digest = hashlib.sha256(f"{salt}/{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
