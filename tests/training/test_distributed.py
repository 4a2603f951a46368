"""What several processes promise each other: sums, means and rows of all, in the order of their ranks."""

import subprocess
import sys

import torch

from medgen.training.distributed import World

EXCHANGE = """
import torch
from medgen.training.distributed import join
with join("cpu") as world:
    rank = world.rank
    assert world.sum_of({"a": rank + 1.0, "b": 0.5}) == {"a": 6.0, "b": 1.5}
    assert world.mean_of({"a": rank + 1.0}) == {"a": 2.0}
    for dtype in (torch.uint8, torch.int64, torch.float32, torch.bool):
        part = torch.full((rank, 2), rank, dtype=dtype)  # none of the first, one of the second, two of the third
        assert torch.equal(world.concat(part), torch.tensor([[1, 1], [2, 2], [2, 2]]).to(dtype))
    assert torch.equal(world.concat(torch.arange(3).expand(2, 3).T), torch.arange(3).repeat(3)[:, None].expand(9, 2))
"""


def test_processes_exchange_sums_and_rows_in_the_order_of_their_ranks():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--standalone", "--no-python"]
    done = subprocess.run([*command, sys.executable, "-c", EXCHANGE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_one_process_exchanges_nothing():
    world = World(0, 1, torch.device("cpu"))
    rows = torch.rand(3, 2)
    assert world.sum_of({"a": 1.5}) == world.mean_of({"a": 1.5}) == {"a": 1.5}
    assert torch.equal(world.concat(rows), rows)
