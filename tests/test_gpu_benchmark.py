"""`python benchmarks/gpu.py`: its small form on a CPU, its time limit, and what it lists."""

import importlib.util
import sys
import time

import pytest
import torch


@pytest.fixture
def gpu(root, monkeypatch):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("benchmark_gpu", root / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_gpu", module)
    spec.loader.exec_module(module)
    return module


def report(gpu, folder, seconds=600.0):
    return gpu.Report(torch.device("cpu"), time.monotonic() + seconds, folder)


def test_speeds_are_measured_on_a_cpu_too(gpu, tmp_path):
    measured = report(gpu, tmp_path)
    for measure in (gpu.describe_machine, gpu.measure_step, gpu.measure_data):
        measured.run(measure.__name__, 0, measure)
    assert not measured.failed and not measured.left_out
    rows = dict(measured.rows)
    assert "images/s (1.00 of float32)" in rows["bare step, 32 px, batch 8, float32"]
    assert "GFLOP per image" in rows["arithmetic of a step"]
    assert "of one batch" in rows["batches from the device's memory"]


@pytest.mark.slow
def test_the_loop_and_a_registered_version_are_measured_on_a_cpu_too(gpu, tmp_path):
    measured = report(gpu, tmp_path)
    for measure in (gpu.measure_loop, gpu.register_version, gpu.train_recipes):
        measured.run(measure.__name__, 0, measure)
    assert not measured.failed
    assert measured.left_out == [f"recipe {name}: made for a GPU" for name in gpu.RECIPES]
    rows = dict(measured.rows)
    assert "of the bare loop" in rows["medgen's loop"]
    assert rows["registered version"] == "models:/gpu, version 1, tag gpu: none"


def test_it_lists_what_failed_and_what_does_not_fit_into_the_time(gpu, tmp_path):
    measured = report(gpu, tmp_path, seconds=50.0)
    measured.run("long", 100, lambda _: pytest.fail("started"))
    measured.run("broken", 1, lambda _: 1 / 0)
    measured.run("fine", 1, lambda found: found.add("speed", "3 images/s"))
    assert "- long: needs about 100 s, 50 s are left" in measured.markdown().replace("49 s", "50 s")
    assert "- broken: ZeroDivisionError: division by zero" in measured.markdown()
    assert "| speed | 3 images/s |" in measured.markdown()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_everything_is_left_out(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    gpu.main()
    assert "no GPU: torch.cuda.is_available() is False" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
