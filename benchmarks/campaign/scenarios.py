"""The scenarios by name; each is a function of the lab and random numbers that runs one round."""

import os
import shutil
from pathlib import Path

from benchmarks.campaign import faults, files, kills, network, serving, writers
from benchmarks.campaign.servers import postgres_programs

SCENARIOS = {
    "kills": kills.kill_stages,
    "kills of the registry": kills.kill_registry,
    "kills of a search": kills.kill_search,
    "power cuts": faults.cut_power,
    "full disk": faults.fill_disk,
    "memory limit": faults.limit_memory,
    "clock jumps": faults.jump_clock,
    "tracking server": network.track_through_faults,
    "database of a search": network.search_through_faults,
    "writers": writers.write_together,
    "files": files.read_mutated,
    "requests": serving.attack_server,
}


def unavailable(name: str) -> str:
    """Why a scenario cannot run on this machine; empty if it can."""
    if name in ("power cuts", "full disk") and os.geteuid():
        return "needs root, to mount a disk of its own"
    if name == "power cuts" and not (
        Path("/dev/loop-control").exists() and shutil.which("mkfs.ext4", path="/usr/sbin:/sbin")
    ):
        return "needs a loop device and mkfs.ext4"
    if name in ("tracking server", "database of a search") and postgres_programs() is None:
        return "needs PostgreSQL"
    return ""
