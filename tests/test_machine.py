"""Cores and threads that this process may use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from medgen import machine

V2, V1 = "0::/jobs/one\n", "4:cpu,cpuacct:/jobs/one\n3:memory:/\n"
QUOTA, PERIOD = "cpu.cfs_quota_us", "cpu.cfs_period_us"


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        (V2, {"cpu.max": "150000 100000"}, 1.5),  # a container, which sees its own group as the root
        (V2, {"jobs/one/cpu.max": "max 100000", "jobs/cpu.max": "300000 100000"}, 3.0),
        (V2, {"jobs/one/cpu.max": "400000 100000", "jobs/cpu.max": "300000 100000"}, 3.0),
        (V2, {"jobs/one/cpu.max": "max 100000"}, None),
        (V2, {}, None),
        (
            V1,
            {f"cpu,cpuacct/jobs/one/{QUOTA}": "50000", f"cpu,cpuacct/jobs/one/{PERIOD}": "100000"},
            0.5,
        ),
        (V1, {f"cpu,cpuacct/{QUOTA}": "-1", f"cpu,cpuacct/{PERIOD}": "100000"}, None),
        (None, {}, None),  # not Linux
    ],
)
def test_quota_is_the_lowest_of_the_control_groups(
    tmp_path: Path, groups: str | None, files: dict[str, str], quota: float | None
) -> None:
    written = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in (written | ({"proc/self/cgroup": groups} if groups else {})).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine.cpu_quota(tmp_path) == quota


@pytest.mark.parametrize(("quota", "cores"), [(None, 64), (1.5, 2), (0.5, 1), (100.0, 64)])
def test_a_quota_limits_the_cores(monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int) -> None:
    """In a container with two of 64 cores, 64 threads would wait for each other."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "affinity", lambda: frozenset(range(64)))
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert machine.num_cores() == machine.num_threads() == cores


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7", "OMP_NUM_THREADS": "5"}])
def test_settings_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch, own: dict[str, str]) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    for name in names:
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine, "affinity", lambda: frozenset(range(64)))
    monkeypatch.setattr(machine, "cpu_quota", lambda: 2.0)
    machine.set_openmp_defaults()
    found = {name: os.environ[name] for name in names if name in os.environ}
    waiting = {} if own else {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "300000"}
    assert found == {"OMP_NUM_THREADS": "2"} | waiting | own


def test_commands_set_them_before_torch_is_loaded(root: Path) -> None:
    code = (
        "import os, sys; from medgen import cli; cli.app = lambda: print(*sorted(n for n in os.environ if 'OMP_' in n),"
        " 'torch' in sys.modules); cli.main()"
    )
    environment = {name: value for name, value in os.environ.items() if "OMP_" not in name}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} <= {*found} and found[-1] == "False"


def test_commands_collect_garbage_rarely_and_end_without_a_last_collection(root: Path) -> None:
    code = (
        "import atexit, gc; from medgen import cli; cli.app = lambda: print(gc.get_threshold()[0]);"
        " atexit.register(lambda: print(len(gc.get_objects()))); cli.main()"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    threshold, left = map(int, found.split())
    assert threshold > 5000 and left < 10
