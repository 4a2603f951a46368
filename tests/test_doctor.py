"""Tests of `medgen doctor`: the results of its checks, and a fix for each problem."""

import json
import os
import shutil
import sqlite3
import ssl
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import trustme

from medgen import doctor
from medgen.config import Data, Evaluate, IntensityWindow, Loss, Phase, Preprocess, Project, Tracking, Train, Weights
from medgen.datasets import weights

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("MEDGEN_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return Project(tmp_path)


def set_dvc_output(monkeypatch: pytest.MonkeyPatch, code: int, out: str = "", err: str = "") -> None:
    result = SimpleNamespace(returncode=code, stdout=out, stderr=err)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: result)


def test_every_problem_has_a_fix(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    set_dvc_output(monkeypatch, 0)
    results = doctor.run(
        project,
        data=Data(),
        preprocess=Preprocess(bits=16, window=IntensityWindow(low=-1000, high=400, unit="HU"), clahe_clip=0),
        loss=Loss(weights=Weights(perceptual=0.1)),
        train=Train(),
        evaluate=Evaluate(),
        tracking=Tracking(uri="file:./mlruns"),
    )
    assert {result.name: result.found for result in results}["intensities"] == "16 bits, black -1000 HU, white 400 HU"
    names = [result.name for result in results]
    assert {"python", "torch", "cpu", "memory", "disk", "weights vgg16", "data", "dvc", "tracking"} <= set(names)
    assert len(names) == len(set(names))
    assert all(result.fix for result in results if result.level != "ok")
    levels = {result.name: result.level for result in results}
    assert levels["torch"] == levels["python"] == "ok"
    assert levels["weights vgg16"] == levels["data"] == levels["tracking"] == "fail"


def test_json_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    good = doctor.Check("disk", "ok", "lots [here]")
    bad = doctor.Check("dvc", "fail", "none", "get some")
    assert doctor.show([good], as_json=True)
    (row,) = json.loads(capsys.readouterr().out)
    assert row == {"name": "disk", "level": "ok", "found": "lots [here]", "fix": "", "mend": ""}
    assert not doctor.show([good, bad])
    table = capsys.readouterr().out
    assert "lots [here]" in table
    assert "get some" in table


def test_mlflow_is_not_imported() -> None:
    script = "import sys, medgen.doctor; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_torchvision_built_for_another_torch_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> object:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return torch

    monkeypatch.setattr(doctor.importlib, "import_module", load)
    result = doctor._check_torch()
    assert result.level == "fail"
    assert "nms" in result.found
    assert "make setup" in result.fix


def test_builds_for_different_cuda_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.11.0+cpu", "torchvision": "0.26.0+cu130"}
    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: SimpleNamespace(__version__=versions[name]))
    assert doctor._check_torch().level == "warn"


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert "OMP_NUM_THREADS=2" in doctor._check_cpu().fix
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert doctor._check_cpu().level == "ok"


@pytest.mark.parametrize(
    ("driver", "device", "level"),
    [(None, "auto", "ok"), (None, "cuda", "fail"), ("450.1", "auto", "warn"), ("450.1", "cuda", "fail")],
)
def test_no_gpu(monkeypatch: pytest.MonkeyPatch, driver: str | None, device: str, level: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: driver)
    (result,) = doctor._check_gpus(Train.model_validate({"device": device}))
    assert result.level == level
    assert (driver or "none") in result.found


@pytest.mark.parametrize(("major", "free", "level", "precision"), [(9, 70e9, "ok", "bf16"), (7, 1e9, "warn", "fp32")])
def test_gpus_with_memory_and_precision(
    monkeypatch: pytest.MonkeyPatch, major: int, free: float, level: str, precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80e9))
    properties = SimpleNamespace(name="NVIDIA Some GPU", major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    results = doctor._check_gpus(Train())
    assert [result.name for result in results] == ["gpu 0", "gpu 1"]
    assert {result.level for result in results} == {level}
    assert all(part in results[0].found for part in ("NVIDIA Some GPU", "80 GB", precision))


@pytest.mark.parametrize(("free", "level"), [(50e9, "ok"), (3e9, "warn"), (1e8, "fail")])
def test_disk(project: Project, monkeypatch: pytest.MonkeyPatch, free: float, level: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1e12, 0, free))
    assert doctor._check_disk(project).level == level


@pytest.mark.parametrize(("free", "level"), [(64e9, "ok"), (1e9, "warn")])
def test_memory(monkeypatch: pytest.MonkeyPatch, free: float, level: str) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    monkeypatch.setattr(doctor, "WARN_MEMORY", 2e9)
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    assert doctor._check_memory().level == level


def test_missing_weights_matter_only_if_parameters_use_them(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    phase = Phase(name="late", epochs=1, weights=Weights(perceptual=0.1))
    seen = Evaluate(extractors=("domain", "inception"))

    def levels(train: Train, evaluate: Evaluate) -> dict[str, str]:
        return {f.name.split()[1]: f.level for f in doctor._check_weights(Loss(), train, evaluate)}

    assert levels(Train(), Evaluate()) == {"vgg16": "ok", "inception": "ok"}
    assert levels(Train(phases=(phase,)), Evaluate()) == {"vgg16": "fail", "inception": "ok"}
    assert levels(Train(), seen) == {"vgg16": "ok", "inception": "warn"}
    start = Train(init_from="weights:/sd-vae-ft-mse")
    assert levels(start, Evaluate()) == {"vgg16": "ok", "inception": "ok", "sd-vae-ft-mse": "fail"}
    weight = weights.WeightsFile(url="https://example.invalid/vgg16.pth", sha256="", size=3, use="")
    monkeypatch.setitem(weights.WEIGHTS, "vgg16", weight)
    (project.root / "weights").mkdir()
    (project.root / "weights" / "vgg16.pth").write_bytes(b"abc")
    assert levels(Train(phases=(phase,)), Evaluate())["vgg16"] == "ok"


def test_data(project: Project) -> None:
    assert "medgen data sample" in doctor._check_data(project, Data()).fix
    (project.root / "data.dvc").write_text("outs: []")
    assert doctor._check_data(project, Data()).fix == "Run `dvc pull data.dvc`"
    (project.root / "data").mkdir()
    assert doctor._check_data(project, Data()).level == "warn"  # the folder is empty
    (project.root / "data" / "a.png").write_bytes(b"")
    assert doctor._check_data(project, Data()).level == "ok"


@pytest.mark.parametrize(
    ("code", "out", "level", "hint"),
    [
        (0, "sample\t/data/remote\t(default)\n", "ok", ""),
        (0, "sample\t/data/remote\n", "warn", "dvc remote default"),
        (0, "", "warn", "dvc remote add -d"),
        (251, "", "fail", "dvc config --list"),
    ],
)
def test_dvc(project: Project, monkeypatch: pytest.MonkeyPatch, code: int, out: str, level: str, hint: str) -> None:
    (project.root / ".dvc").mkdir()
    set_dvc_output(monkeypatch, code, out, "ERROR: configuration error")
    result = doctor._check_dvc(project)
    assert result.level == level
    assert hint in result.fix


def test_dvc_command(project: Project) -> None:
    """DVC itself prints the texts and exit codes of the table above."""
    assert "dvc init" in doctor._check_dvc(project).fix
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "-q", "--no-scm"], cwd=project.root, check=True)
    assert doctor._check_dvc(project).level == "warn"
    subprocess.run([*dvc, "remote", "add", "-q", "-d", "store", "remote"], cwd=project.root, check=True)
    result = doctor._check_dvc(project)
    assert result.level == "ok"
    assert result.found.startswith("store")


def test_tracking_file_missing_created_locked_and_damaged(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    path = project.root / "mlflow.db"
    assert "the first run creates" in doctor._check_tracking(project, Tracking()).found
    assert not path.exists()  # the check creates nothing
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE runs (id INTEGER)")
    assert doctor._check_tracking(project, Tracking()).level == "ok"
    connection.execute("BEGIN EXCLUSIVE")
    assert doctor._check_tracking(project, Tracking()).level == "warn"
    connection.close()
    path.write_bytes(b"not a database at all" * 100)
    result = doctor._check_tracking(project, Tracking())
    assert (result.level, "medgen sync" in result.fix) == ("fail", True)


@pytest.mark.parametrize(
    ("uri", "level"),
    [("sqlite:////no/such/folder/mlflow.db", "fail"), ("./mlruns", "fail"), ("mysql://db/mlflow", "ok")],
)
def test_other_tracking_stores(project: Project, uri: str, level: str) -> None:
    assert doctor._check_tracking(project, Tracking(uri=uri)).level == level
    assert doctor._check_tracking(project, Tracking(uri=uri, enabled=False)).level == "ok"


class Health(BaseHTTPRequestHandler):
    code = 200

    def do_GET(self) -> None:
        self.send_response(self.code if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(handler: type[Health], ssl_context: ssl.SSLContext | None = None) -> Iterator[str]:
    """Yield the address of a running server; it contains a password."""
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if ssl_context:
        running.socket = ssl_context.wrap_socket(running.socket, server_side=True)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"{'https' if ssl_context else 'http'}://someone:secret@127.0.0.1:{running.server_address[1]}/"
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.mark.parametrize(("code", "level", "hint"), [(200, "ok", ""), (403, "warn", "--allowed-hosts")])
def test_tracking_server(project: Project, monkeypatch: pytest.MonkeyPatch, code: int, level: str, hint: str) -> None:
    monkeypatch.setenv(doctor.CA_FILE, "/no/such/file")  # not used for http
    with serving(type("Handler", (Health,), {"code": code})) as uri:
        result = doctor._check_tracking(project, Tracking(uri=uri))
    assert result.level == level
    assert hint in result.fix
    assert "secret" not in result.found


@pytest.mark.parametrize(
    ("ca_file", "level", "found"),
    [("ca.pem", "ok", "https://127.0.0.1"), (None, "warn", "CERTIFICATE_VERIFY_FAILED"), ("no.pem", "fail", "no.pem")],
)
def test_tracking_server_with_a_private_certificate_authority(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ca_file: str | None, level: str, found: str
) -> None:
    authority, ssl_context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(ssl_context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.delenv(doctor.CA_FILE, raising=False)
    if ca_file:
        monkeypatch.setenv(doctor.CA_FILE, str(tmp_path / ca_file))
    with serving(Health, ssl_context) as uri:
        result = doctor._check_tracking(project, Tracking(uri=uri))
    assert (result.level, found in result.found) == (level, True), result


def test_unreachable_tracking_database_is_a_warning_without_its_password(project: Project) -> None:
    pytest.importorskip("psycopg")
    uri = "postgresql://alice:hunter2@127.0.0.1:1/mlflow"
    result = doctor._check_tracking(project, Tracking(uri=uri, timeout_seconds=1))
    assert result.level == "warn" and "does not answer" in result.found and "hunter2" not in result.found


def test_unreachable_tracking_server_is_a_warning(project: Project) -> None:
    result = doctor._check_tracking(project, Tracking(uri="http://127.0.0.1:1", timeout_seconds=0.5))
    assert result.level == "warn"
    assert "medgen sync" in result.fix
