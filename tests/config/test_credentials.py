"""Passwords in addresses of params.yaml are used, and never recorded or shown."""

import pytest

from medgen.config import Params, Tracking, Tune, fingerprint, replace, without_credentials
from medgen.tune.params_file import read_without_credentials


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:secret@host:5000/x", "https://host:5000/x"),
        ("https://secret@host/x", "https://host/x"),  # a token is a user without a password
        ("http://alice:SECRET/WORD@127.0.0.1:1", "http://127.0.0.1:1"),
        ("http://alice:S@CRET#W?RD@host/x", "http://host/x"),
        ("postgresql://host/db?user=a&password=secret&sslmode=require", "postgresql://host/db?user=a&sslmode=require"),
        ("postgresql+psycopg://a:secret@host/db?PASSWORD=secret", "postgresql+psycopg://host/db"),
        ("https://host/x?access_token=secret", "https://host/x"),
        ("sqlite:////abs/me@home/runs.db", "sqlite:////abs/me@home/runs.db"),
        ("optuna@home.journal", "optuna@home.journal"),
    ],
)
def test_credentials_are_removed_from_addresses(url, shown):
    assert without_credentials(url) == shown


def secret_params():
    tracking = Tracking(uri="https://alice:hunter2@host")
    return Params(tracking=tracking, tune=Tune(storage="postgresql://alice:hunter2@host/db"))


def test_dumps_of_parameters_have_no_credentials_and_changed_parameters_keep_them():
    params = secret_params()
    assert "hunter2" not in params.model_dump_json() + repr(params.model_dump()) + repr(params.tune.model_dump())
    changed = replace(params, {"train.batch_size": 4}, "test")
    assert (changed.tracking.uri, changed.tune.storage) == (params.tracking.uri, params.tune.storage)
    assert fingerprint(params.tracking) == fingerprint(Tracking(uri="https://host"))


def test_the_copy_of_params_yaml_that_best_yaml_is_made_from_has_no_credentials(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_bytes(
        b'tune: {storage: "postgresql://alice:hunter2@host/db"}  # ours\r\ntracking:\r\n  enabled: true\r\n'
    )
    copy = read_without_credentials(path)
    assert copy == "tune: {storage: postgresql://host/db}  # ours\r\ntracking:\r\n  enabled: true\r\n"
