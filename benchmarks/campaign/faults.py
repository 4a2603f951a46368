"""Faults of the machine: power cuts, full and read-only disks, too little memory, clocks that jump."""

import os
import random
import resource
import shutil
import subprocess
import time
from pathlib import Path

from benchmarks.campaign.lab import Lab
from benchmarks.campaign.process import Child, Violation
from benchmarks.campaign.project import STAGES, check_history, residue

MAX_FAULTS = 3  # in one round
TMPFS = "256m"
DISK_OPTIONS = "loop,noauto_da_alloc,commit=300"
YEAR = 365 * 86400.0


def cut_power(lab: Lab, draws: random.Random) -> None:
    """A stage on a disk of its own, whose power is cut: only what had reached the disk is left."""
    stage = draws.choice(STAGES)
    disk = new_disk(lab)
    lab.restore(stage)
    command("sync", "-f", str(lab.project))
    for _ in range(draws.randint(1, MAX_FAULTS)):
        child = lab.start(stage)
        child.process.join(draws.uniform(0.2, 1.1) * lab.seconds[stage])
        child.kill()
        child.wait()
        disk = after_cut(lab, disk)
        lab.counts["faults"] += 1
    lab.run(stage)
    lab.check_stage(stage)


def new_disk(lab: Lab) -> Path:
    """A file with ext4, which is mounted as the project's folder.

    With noauto_da_alloc ext4 does no more than it promises: a file that is renamed without fsync may be empty.
    """
    disk = lab.work / "disk" / "0.img"
    disk.parent.mkdir()
    with disk.open("wb") as file:
        file.truncate(256 << 20)
    command("mkfs.ext4", "-q", "-F", str(disk))
    mount(lab, str(disk), DISK_OPTIONS)
    return disk


def after_cut(lab: Lab, disk: Path) -> Path:
    """Replace the mounted disk by a copy of its file: what a power cut at this moment leaves."""
    copy = disk.with_name(f"{int(disk.stem) + 1}.img")
    command("cp", "--sparse=always", str(disk), str(copy))
    unmount(lab.project)
    disk.unlink()
    mount(lab, str(copy), DISK_OPTIONS)
    return copy


def fill_disk(lab: Lab, draws: random.Random) -> None:
    """A command on a disk that becomes full at some write, or is read-only: one message; then it does its work."""
    name = draws.choice((*STAGES, "sync", "promote"))
    words = ("promote", "--force", "a test") if name == "promote" else (name,)
    mount(lab, "tmpfs", f"size={TMPFS}", "-t", "tmpfs")
    lab.restore(name if name in STAGES else "done")
    if name == "sync":
        shutil.copy(lab.snapshot("train") / "mlflow.db", lab.project / "mlflow.db")  # MLflow has received nothing
    needed = size_of(lab.snapshot(next_snapshot(name))) - size_of(lab.project) if name in STAGES else 1 << 20
    read_only = draws.random() < 0.2
    for share in [0] if read_only else sorted(draws.randint(0, needed) for _ in range(MAX_FAULTS)):
        kilobytes = (shutil.disk_usage(lab.project).used + share // MAX_FAULTS) // 4096 * 4 + 4
        command("mount", "-o", "remount,ro" if read_only else f"remount,size={kilobytes}k", str(lab.project))
        child = lab.start(*words)
        check_message(child, child.wait(), codes=(0, 2))
        lab.counts["faults"] += 1
        if not read_only and (left := residue(lab.project)):
            raise Violation("lost", f"{child.name}: on a full disk left {', '.join(left)}\n{child.output()}")
        command("mount", "-o", f"remount,rw,size={TMPFS}", str(lab.project))
    lab.run(*words)
    if name in STAGES:
        lab.check_stage(name)
    elif name == "sync":
        lab.check_points("done")
    else:
        check_history(lab.run("history", "--json"))


def limit_memory(lab: Lab, draws: random.Random) -> None:
    """A stage that may allocate little more memory than its imports take; then the stage resumes."""
    stage = draws.choice(STAGES)
    lab.restore(stage)
    for _ in range(MAX_FAULTS):
        extra = int(draws.uniform(0, 400)) << 20
        child = lab.start(stage, prepare=[lambda extra=extra: limit(extra)])
        code = child.wait()
        if code not in (0, 2):  # native code may end the process, but only for want of memory
            check_memory(child, code)
        lab.counts["faults"] += 1
    lab.run(stage)
    lab.check_stage(stage)


def jump_clock(lab: Lab, draws: random.Random) -> None:
    """A stage whose clock jumps by up to ten years, back and forth."""
    stage = draws.choice(STAGES)
    lab.restore(stage)
    seed = draws.random()
    lab.run(stage, prepare=[lambda: jumping(random.Random(seed))])
    lab.counts["faults"] += 1
    lab.check_stage(stage)


def check_message(child: Child, code: int, codes: tuple[int, ...]) -> None:
    """Raise Violation unless the command ended with one of the codes and no traceback."""
    output = child.output()
    if code not in codes or "Traceback" in output:
        raise Violation("crashed", f"{child.name}: exit code {code}\n{output}")


def check_memory(child: Child, code: int) -> None:
    """Raise Violation unless a process that ended with a traceback or a signal had no memory left."""
    output = child.output().lower()
    reasons = (
        "memoryerror",
        "allocate",
        "bad_alloc",
        "out of memory",
        "resource temporarily unavailable",
        "can't start new thread",
        "could not create a primitive",  # oneDNN
    )
    if not any(reason in output for reason in reasons):
        raise Violation("crashed", f"{child.name}: exit code {code}\n{output}")


def limit(extra: int) -> None:
    """Limit the address space of this process to what it has and `extra` bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def jumping(draws: random.Random) -> None:
    """Let `time.time` jump in this process."""
    clock, offset = time.time, 0.0

    def now() -> float:
        nonlocal offset
        if draws.random() < 0.05:
            offset = draws.choice((0.0, 1.0, 60.0, 86400.0, YEAR)) * draws.uniform(-10.0, 10.0)
        return clock() + offset

    time.time = now


def next_snapshot(stage: str) -> str:
    """Name of the snapshot after a stage."""
    return [*STAGES, "done"][STAGES.index(stage) + 1]


def size_of(folder: Path) -> int:
    """Bytes of all files, in pages of 4096 as tmpfs counts them."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def mount(lab: Lab, source: str, options: str, *more: str) -> None:
    """Mount something as the project's folder until the end of the round."""
    lab.project.mkdir(exist_ok=True)
    command("mount", *more, "-o", options, source, str(lab.project))
    lab.cleanup.append(lambda: unmount(lab.project))


def unmount(folder: Path) -> None:
    """Unmount a folder, even while a process has files open in it; no error if nothing is mounted there."""
    if os.path.ismount(folder):
        command("umount", "--lazy", str(folder))


def command(*words: str) -> None:
    """Run a command of the system.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(
        words, capture_output=True, text=True, env=os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr}")
