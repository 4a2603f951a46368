"""Batches do not depend on where the images are kept; they are read ahead, and never all at once."""

import gc
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medgen.config import Preprocess, seed_of
from medgen.data.conditions import ConditionSpace
from medgen.data.store import ShardedArray, Split, StoreWriter
from medgen.training import loader
from medgen.training.loader import Batch, Loader

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 1, 8, 8), dtype=np.uint8)
MASKS = (IMAGES > 127).astype(np.uint8)
LABELS = np.arange(23) % 3


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> Split:
    """23 images in three files, all with a mask."""
    monkeypatch.setattr(Split, "masked_rows", np.arange(23))
    images, masks = (ShardedArray([array[:10], array[10:20], array[20:]]) for array in (IMAGES, MASKS))
    return Split("train", images, LABELS, masks, Path())


def equal(batch: Batch, rows: torch.Tensor) -> bool:
    """True if a batch holds these rows, unflipped."""
    image = torch.from_numpy(IMAGES)[rows].float() / 255
    masks_equal = batch.mask is None or batch.mask.equal(torch.from_numpy(MASKS)[rows].float())
    labels_equal = batch.label.equal(torch.from_numpy(LABELS)[rows])
    return batch.index.equal(rows) and batch.image.equal(image) and labels_equal and masks_equal


@pytest.mark.parametrize("with_masks", [False, True])
def test_a_batch_depends_on_its_position_only(split: Split, with_masks: bool) -> None:
    batches = Loader(split, 4, "cpu", seed=7, with_masks=with_masks)
    assert (batches.num_images, batches.num_batches) == (23, 5)
    for position in (0, 1, 2, 9, 10, 3, 3, 0, 104):  # in order, across epochs, back after a rollback, far ahead
        epoch, step = divmod(position, 5)
        order = torch.randperm(23, generator=torch.Generator().manual_seed(seed_of(7, epoch)))
        assert equal(batches.batch(position), order[4 * step : 4 * step + 4]), position


def test_ranks_share_each_batch(split: Split) -> None:
    whole = Loader(split, 6, "cpu", seed=7)
    parts = [Loader(split, 6, "cpu", seed=7, rank=rank, world=2) for rank in range(2)]
    for position in range(7):
        rows = whole.batch(position).index
        assert all(equal(part.batch(position), rows[rank::2]) for rank, part in enumerate(parts))


def test_a_flipped_batch_is_the_same_after_a_restart(split: Split) -> None:
    first = Loader(split, 8, "cpu", seed=3, horizontal_flip=True, with_masks=True)
    wanted = [first.batch(position) for position in range(4)]
    again = Loader(split, 8, "cpu", seed=3, horizontal_flip=True, with_masks=True).batch(3)
    assert again.image.equal(wanted[3].image)
    plain = torch.from_numpy(IMAGES)[again.index].float() / 255
    assert not again.image.equal(plain)
    assert ((again.image * 255) > 127).float().equal(again.mask)  # type: ignore[arg-type]


def test_crops_depend_on_the_position_only_and_reach_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The crop of a volume and of its mask is the same; the ranks of a batch share its draws."""
    volumes = np.arange(6 * 7 * 8, dtype=np.uint16).reshape(1, 1, 6, 7, 8).repeat(5, axis=0)
    monkeypatch.setattr(Split, "masked_rows", np.arange(5))
    masks = ShardedArray([(volumes % 251).astype(np.uint8)])
    split = Split("train", ShardedArray([volumes]), LABELS[:5], masks, Path())
    settings = {"seed": 7, "with_masks": True, "patch": (4, 4, 8)}
    crops, starts = Loader(split, 4, "cpu", **settings), set()
    for position in range(60):
        batch = crops.batch(position)
        assert batch.image.shape == (4, 1, 4, 4, 8) and batch.mask is not None
        for image, mask in zip((batch.image * 65535).round().long(), batch.mask.long(), strict=True):
            plane, row, column = (int(place) for place in np.unravel_index(int(image[0, 0, 0, 0]), (6, 7, 8)))
            whole = torch.from_numpy(volumes[0, 0, plane : plane + 4, row : row + 4, column:].astype(np.int64))
            assert image[0].equal(whole) and mask[0].equal(whole % 251)
            starts.add((plane, row, column))
    assert starts == {(plane, row, 0) for plane in range(3) for row in range(4)}
    again = [Loader(split, 4, "cpu", rank=rank, world=2, **settings).batch(3).image for rank in range(2)]
    assert all(part.equal(crops.batch(3).image[rank::2]) for rank, part in enumerate(again))
    assert next(crops.sequential()).image.shape == (4, 1, 6, 7, 8)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("subset", [None, 9])
def test_each_process_reads_consecutive_batches_of_the_pass(split: Split, world: int, subset: int | None) -> None:
    whole = [batch.index.tolist() for batch in Loader(split, 4, "cpu", subset=subset).sequential()]
    assert [len(rows) for rows in whole] == ([4] * 5 + [3] if subset is None else [4, 4, 1])
    parts = []
    for rank in range(world):
        part = [batch.index for batch in Loader(split, 4, "cpu", rank=rank, world=world, subset=subset).sequential()]
        assert len(part) in (len(whole) // world, len(whole) // world + 1)
        parts += [rows.tolist() for rows in part]
    assert parts == whole
    assert all(equal(batch, batch.index) for batch in Loader(split, 4, "cpu", with_masks=True).sequential())


def test_conditions_belong_to_their_images_and_maps_are_mirrored_with_them(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paired images are the images themselves, so they are equal after the flip too."""
    kinds = {"copy": {"kind": "image", "folder": "copy"}, "age": {"kind": "number", "low": 0, "high": 100}}
    space = ConditionSpace.from_rows(Preprocess(conditions=kinds), [])
    assert space is not None
    values = np.stack([np.ones(23), np.arange(23) / 100], axis=1).astype(np.float32)
    monkeypatch.setattr(Split, "condition_values", values)
    monkeypatch.setattr(Split, "has_map", lambda *_: np.ones(23, bool))
    paired = replace(split, conditions=space, paired=split.images)
    for batches in (Loader(paired, 8, "cpu", horizontal_flip=True, with_conditions=True), Loader(split, 8, "cpu")):
        batch = batches.batch(3)
        if batches.horizontal_flip:
            assert batch.conditions is not None and batch.conditions.maps is not None
            assert torch.equal(batch.conditions.maps[:, 1:], batch.image)
            assert not torch.equal(batch.image, torch.from_numpy(IMAGES)[batch.index].float() / 255), "some are flipped"
            assert torch.allclose(batch.conditions.values[:, 1], batch.index / 100)
            part = batch.part(1, 2)
            assert part.conditions is not None and torch.equal(part.conditions.values[:, 1] * 100, part.index.float())
        else:
            assert batch.conditions is None


def test_the_next_batches_are_read_before_they_are_asked_for(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    read, done = [], threading.Semaphore(0)
    original = Loader._read_step

    def counted(self: Loader, position: int) -> object:
        read.append((position, threading.current_thread() is threading.main_thread()))
        done.release()
        return original(self, position)

    monkeypatch.setattr(Loader, "_read_step", counted)
    batches = Loader(split, 4, "cpu")
    batches.batch(0)
    for _ in range(1 + loader.NUM_AHEAD):
        assert done.acquire(timeout=30)
    batches.batch(1)
    assert done.acquire(timeout=30)
    assert sorted(read) == [(position, False) for position in range(loader.NUM_AHEAD + 2)], "once each, in the thread"


def test_an_error_in_the_thread_reaches_the_step_that_needs_the_batch(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Loader._read_step

    def failing(self: Loader, position: int) -> object:
        if position == 2:
            raise OSError("the disk fails")
        return original(self, position)

    monkeypatch.setattr(Loader, "_read_step", failing)
    batches = Loader(split, 4, "cpu")
    assert len(batches.batch(0).image) == len(batches.batch(1).image) == 4
    with pytest.raises(OSError, match="the disk fails"):
        batches.batch(2)
    assert len(batches.batch(3).image) == 4


def test_the_thread_ends_with_the_loader(split: Split) -> None:
    before = set(threading.enumerate())
    batches = Loader(split, 4, "cpu")
    batches.batch(0)
    next(batches.sequential())  # a pass that is not finished
    (thread,) = set(threading.enumerate()) - before
    del batches
    for _ in range(1000):  # the last batches that it reads still need the loader
        gc.collect()
        thread.join(timeout=0.03)
        if not thread.is_alive():
            break
    assert not thread.is_alive()


LIMITED = """
import resource, sys
from pathlib import Path
from medgen.data.store import open_store
from medgen.training.loader import Loader

with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
limit = used + (64 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
loader = Loader(open_store(Path(sys.argv[1])).split("train"), 64, "cpu")
assert loader.num_images == 12000
assert {int(loader.batch(position).index.max()) for position in range(20)}
total = sum(float(batch.image.mean()) * len(batch.index) for batch in loader.sequential())
print(total / loader.num_images)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA limits a process's own memory on Linux")
def test_a_split_larger_than_memory_is_read(tmp_path: Path) -> None:
    """Under a hard limit on the process's own memory, a third of the images."""
    images = np.random.default_rng(0).integers(0, 256, (16, 1, 128, 128), dtype=np.uint8)
    with StoreWriter(tmp_path / "dataset", (1, 128, 128), with_masks=False) as writer:
        for number in range(12000):  # 197 MB
            writer.add(images[number % 16], None, {"path": f"{number}.png"})
        writer.commit(["train"] * 12000, [], {}, "source")
    command = [sys.executable, "-c", LIMITED, tmp_path / "dataset"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert float(done.stdout) == pytest.approx(images.mean() / 255, rel=1e-5)
