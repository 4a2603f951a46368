"""Records -> train, val or test: by patient, in equal shares of every label, the same for the same seed."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from medgen.data.layouts import Record


def assign(records: Sequence[Record], val_fraction: float, test_fraction: float, seed: int) -> list[str]:
    """Split of each record, "train", "val" or "test".

    A split the data brings is kept. One it does not bring is cut from the rest by whole patients, so that its share
    of each label's images comes nearest to the fraction. Who is cut follows from a hash of seed and patient, so the
    order of files does not matter, and when files are added only patients at the edge of a share can move.
    """
    given: dict[str, Counter[str]] = defaultdict(Counter)  # patient -> splits the data names
    for record in records:
        if record.split is not None:
            given[record.patient][record.split] += 1
    present = {split for splits in given.values() for split in splits}

    pool: dict[str, list[Record]] = defaultdict(list)  # patients that may still be moved out of train
    for record in records:
        if record.split == "train" or (record.split is None and record.patient not in given):
            pool[record.patient].append(record)
    for patient, splits in given.items():
        if set(splits) != {"train"}:
            pool.pop(patient, None)
    chosen = dict.fromkeys(pool, "train")
    for split, fraction in (("test", test_fraction), ("val", val_fraction)):
        if split not in present:
            rest = {patient: pool[patient] for patient in pool if chosen[patient] == "train"}
            kept = 1.0 if split == "test" or "test" in present else 1.0 - test_fraction  # fractions are of the whole
            chosen.update(dict.fromkeys(_cut(rest, min(fraction / kept, 1.0), f"{seed}/{split}"), split))

    # A patient's unnamed images follow its named ones; named ones stay where the data put them.
    leading = {patient: splits.most_common(1)[0][0] for patient, splits in given.items()}
    return [chosen.get(record.patient) or record.split or leading[record.patient] for record in records]


def _cut(pool: dict[str, list[Record]], fraction: float, salt: str) -> Iterable[str]:
    """Patients that together hold `fraction` of each label's images."""
    if fraction <= 0:
        return
    strata: dict[str, list[str]] = defaultdict(list)
    for patient, records in pool.items():
        strata[_main_label(records)].append(patient)
    for patients in strata.values():
        most = fraction * sum(len(pool[patient]) for patient in patients)
        ranked = sorted(patients, key=lambda patient: _rank(patient, salt))
        taken: list[str] = []
        num_images = 0
        for patient in ranked:
            if num_images + len(pool[patient]) / 2 <= most and len(taken) < len(ranked) - 1:
                taken.append(patient)
                num_images += len(pool[patient])
        if not taken and len(ranked) > 2:  # so that a rare label is seen in every split
            taken = [min(ranked, key=lambda patient: len(pool[patient]))]
        yield from taken


def _main_label(records: Sequence[Record]) -> str:
    """A patient with several labels stands in one split all the same, counted under its commonest."""
    counts = Counter(record.label or "" for record in records)
    return min(counts, key=lambda label: (-counts[label], label))


def _rank(patient: str, salt: str) -> bytes:
    return hashlib.sha256(f"{salt}/{patient}".encode()).digest()
