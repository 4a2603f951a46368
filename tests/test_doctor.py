"""medgen doctor: what it finds, and that each finding says how to mend it."""

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
from medgen.config import Data, Evaluate, Loss, Phase, Project, Tracking, Train, Weights
from medgen.datasets import weights

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("MEDGEN_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return Project(tmp_path)


def dvc_says(monkeypatch: pytest.MonkeyPatch, code: int, out: str = "", err: str = "") -> None:
    answer = SimpleNamespace(returncode=code, stdout=out, stderr=err)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: answer)


def test_every_finding_that_is_not_ok_says_what_to_do(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    dvc_says(monkeypatch, 0)
    findings = doctor.run(
        project,
        data=Data(),
        loss=Loss(weights=Weights(perceptual=0.1)),
        train=Train(),
        evaluate=Evaluate(),
        tracking=Tracking(uri="file:./mlruns"),
    )
    names = [finding.name for finding in findings]
    assert {"python", "torch", "cpu", "memory", "disk", "weights vgg16", "data", "dvc", "tracking"} <= set(names)
    assert len(names) == len(set(names))
    assert all(finding.mend for finding in findings if finding.level != "ok")
    levels = {finding.name: finding.level for finding in findings}
    assert levels["torch"] == levels["python"] == "ok"
    assert levels["weights vgg16"] == levels["data"] == levels["tracking"] == "fail"


def test_findings_print_as_json_or_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    good = doctor.Finding("disk", "ok", "lots [here]")
    bad = doctor.Finding("dvc", "fail", "none", "get some")
    assert doctor.show([good], as_json=True)
    assert json.loads(capsys.readouterr().out) == [{"name": "disk", "level": "ok", "found": "lots [here]", "mend": ""}]
    assert not doctor.show([good, bad])
    table = capsys.readouterr().out
    assert "lots [here]" in table
    assert "get some" in table


def test_mlflow_is_not_imported() -> None:
    script = "import sys, medgen.doctor; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_torchvision_built_for_another_torch_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> object:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return torch

    monkeypatch.setattr(doctor.importlib, "import_module", load)
    finding = doctor._torchvision()
    assert finding.level == "fail"
    assert "nms" in finding.found
    assert "uv sync" in finding.mend


def test_builds_for_different_cuda_versions_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.11.0+cpu", "torchvision": "0.26.0+cu130"}
    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: SimpleNamespace(__version__=versions[name]))
    assert doctor._torchvision().level == "warn"


def test_more_threads_than_cores_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert "OMP_NUM_THREADS=2" in doctor._cpu().mend
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert doctor._cpu().level == "ok"


@pytest.mark.parametrize(
    ("driver", "device", "level"),
    [(None, "auto", "ok"), (None, "cuda", "fail"), ("450.1", "auto", "warn"), ("450.1", "cuda", "fail")],
)
def test_no_gpu(monkeypatch: pytest.MonkeyPatch, driver: str | None, device: str, level: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: driver)
    (finding,) = doctor._gpus(Train.model_validate({"device": device}))
    assert finding.level == level
    assert (driver or "none") in finding.found


@pytest.mark.parametrize(("major", "free", "level", "precision"), [(9, 70e9, "ok", "bf16"), (7, 1e9, "warn", "fp32")])
def test_gpus_are_named_with_memory_and_precision(
    monkeypatch: pytest.MonkeyPatch, major: int, free: float, level: str, precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80e9))
    properties = SimpleNamespace(name="NVIDIA Some GPU", major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    findings = doctor._gpus(Train())
    assert [finding.name for finding in findings] == ["gpu 0", "gpu 1"]
    assert {finding.level for finding in findings} == {level}
    assert all(part in findings[0].found for part in ("NVIDIA Some GPU", "80 GB", precision))


@pytest.mark.parametrize(("free", "level"), [(50e9, "ok"), (3e9, "warn"), (1e8, "fail")])
def test_disk(project: Project, monkeypatch: pytest.MonkeyPatch, free: float, level: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1e12, 0, free))
    assert doctor._disk(project).level == level


@pytest.mark.parametrize(("free", "level"), [(64e9, "ok"), (1e9, "warn")])
def test_memory(monkeypatch: pytest.MonkeyPatch, free: float, level: str) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    monkeypatch.setattr(doctor, "LITTLE_MEMORY", 2e9)
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    assert doctor._memory().level == level


def test_weights_are_only_missed_where_parameters_need_them(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    phase = Phase(name="late", epochs=1, weights=Weights(perceptual=0.1))
    seen = Evaluate(extractors=("domain", "inception"))

    def levels(train: Train, evaluate: Evaluate) -> dict[str, str]:
        return {f.name.split()[1]: f.level for f in doctor._weights(Loss(), train, evaluate)}

    assert levels(Train(), Evaluate()) == {"vgg16": "ok", "inception": "ok"}
    assert levels(Train(phases=(phase,)), Evaluate()) == {"vgg16": "fail", "inception": "ok"}
    assert levels(Train(), seen) == {"vgg16": "ok", "inception": "warn"}
    weight = weights.Weight(url="https://example.invalid/vgg16.pth", sha256="", size=3, use="")
    monkeypatch.setitem(weights.WEIGHTS, "vgg16", weight)
    (project.root / "weights").mkdir()
    (project.root / "weights" / "vgg16.pth").write_bytes(b"abc")
    assert levels(Train(phases=(phase,)), Evaluate())["vgg16"] == "ok"


def test_data(project: Project) -> None:
    assert "medgen data sample" in doctor._data(project, Data()).mend
    (project.root / "data.dvc").write_text("outs: []")
    assert doctor._data(project, Data()).mend == "`dvc pull data.dvc`"
    (project.root / "data").mkdir()
    assert doctor._data(project, Data()).level == "warn"  # an empty folder is no data
    (project.root / "data" / "a.png").write_bytes(b"")
    assert doctor._data(project, Data()).level == "ok"


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
    dvc_says(monkeypatch, code, out, "ERROR: configuration error")
    finding = doctor._dvc(project)
    assert finding.level == level
    assert hint in finding.mend


def test_dvc_for_real(project: Project) -> None:
    """The words and codes that the table above takes for DVC's are DVC's."""
    assert "dvc init" in doctor._dvc(project).mend
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "-q", "--no-scm"], cwd=project.root, check=True)
    assert doctor._dvc(project).level == "warn"
    subprocess.run([*dvc, "remote", "add", "-q", "-d", "store", "remote"], cwd=project.root, check=True)
    finding = doctor._dvc(project)
    assert finding.level == "ok"
    assert finding.found.startswith("store")


def test_tracking_file_absent_made_damaged_and_locked(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    path = project.root / "mlflow.db"
    assert "will be made" in doctor._tracking(project, Tracking()).found
    assert not path.exists()  # looking makes nothing
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE runs (id INTEGER)")
    assert doctor._tracking(project, Tracking()).level == "ok"
    connection.execute("BEGIN EXCLUSIVE")
    assert doctor._tracking(project, Tracking()).level == "warn"
    connection.close()
    path.write_bytes(b"no database at all" * 100)
    finding = doctor._tracking(project, Tracking())
    assert (finding.level, "medgen sync" in finding.mend) == ("fail", True)


@pytest.mark.parametrize(
    ("uri", "level"),
    [("sqlite:////no/such/folder/mlflow.db", "fail"), ("./mlruns", "fail"), ("postgresql://db/mlflow", "ok")],
)
def test_tracking_elsewhere(project: Project, uri: str, level: str) -> None:
    assert doctor._tracking(project, Tracking(uri=uri)).level == level
    assert doctor._tracking(project, Tracking(uri=uri, enabled=False)).level == "ok"


class Health(BaseHTTPRequestHandler):
    code = 200

    def do_GET(self) -> None:
        self.send_response(self.code if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(handler: type[Health], secured: ssl.SSLContext | None = None) -> Iterator[str]:
    """Address of a server, with a password in it."""
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if secured:
        running.socket = secured.wrap_socket(running.socket, server_side=True)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"{'https' if secured else 'http'}://someone:secret@127.0.0.1:{running.server_address[1]}/"
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.mark.parametrize(("code", "level", "hint"), [(200, "ok", ""), (403, "warn", "--allowed-hosts")])
def test_tracking_server(project: Project, monkeypatch: pytest.MonkeyPatch, code: int, level: str, hint: str) -> None:
    monkeypatch.setenv(doctor.ISSUER, "/no/such/file")  # nothing to a server without a certificate
    with serving(type("Handler", (Health,), {"code": code})) as uri:
        finding = doctor._tracking(project, Tracking(uri=uri))
    assert finding.level == level
    assert hint in finding.mend
    assert "secret" not in finding.found


@pytest.mark.parametrize(
    ("issuer", "level", "found"),
    [("ca.pem", "ok", "https://127.0.0.1"), (None, "warn", "CERTIFICATE_VERIFY_FAILED"), ("no.pem", "fail", "no.pem")],
)
def test_tracking_server_with_a_certificate_of_its_own(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, issuer: str | None, level: str, found: str
) -> None:
    authority, secured = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(secured)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.delenv(doctor.ISSUER, raising=False)
    if issuer:
        monkeypatch.setenv(doctor.ISSUER, str(tmp_path / issuer))
    with serving(Health, secured) as uri:
        finding = doctor._tracking(project, Tracking(uri=uri))
    assert (finding.level, found in finding.found) == (level, True), finding


def test_a_tracking_server_that_is_away_is_a_warning(project: Project) -> None:
    finding = doctor._tracking(project, Tracking(uri="http://127.0.0.1:1", timeout_seconds=0.5))
    assert finding.level == "warn"
    assert "medgen sync" in finding.mend
