"""Write the best values into a copy of the params file (best.yaml), or into the file itself; keep all other text."""

from pathlib import Path

from optuna.trial import FrozenTrial
from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from medgen.config import Params, load, replace, without_credentials
from medgen.config.edit import Value, as_yaml, newline, set_value
from medgen.errors import UserError
from medgen.io import write_atomic
from medgen.tune.space import value_at
from medgen.tune.study import Study, trial_name


def write_best(study: Study, trial: FrozenTrial, params_file: Path, folder: Path) -> Path:
    """Write best.yaml: the params file with the trial's values, below comments that name study, trial and metrics.

    Raises:
        UserError: as in `apply_best`.
    """
    scores = study.scores(trial)
    head = [
        f"# medgen tune, study {study.name}: {trial_name(trial)}, best of {len(study.trials)}",
        *(f"# val {name} {score:.5g}" for name, score in scores.items()),
        f"# {params_file.name} with this trial's values; `medgen tune --apply` writes them into it",
    ]
    text = _insert_values(study, trial, params_file).removeprefix("\ufeff")
    path = folder / "best.yaml"
    comments = "".join(f"{line}{newline(text)}" for line in [*head, "#"])
    write_atomic(path, (comments + text).encode())
    return path


def read_without_credentials(params_file: Path) -> str:
    """The text of the params file, without users and passwords in its addresses: best.yaml is made from it."""
    text, params = params_file.read_bytes().decode(), load(params_file)  # read_text would convert \r\n to \n
    for key, url in (("tracking.uri", params.tracking.uri), ("tune.storage", params.tune.storage)):
        if (public := without_credentials(url)) != url:
            text = set_value(text, key, public)
    return text


def apply_best(study: Study, trial: FrozenTrial, params_file: Path) -> bool:
    """Write the trial's values into the params file; all other text stays the same.

    Returns:
        False if the file has these values already; it is not written then.

    Raises:
        UserError: the file is missing or invalid, or the values cannot be written into it; it is not changed.
    """
    text = _insert_values(study, trial, params_file)
    if text.encode() == params_file.read_bytes():
        return False
    write_atomic(params_file, text.encode())
    return True


def _insert_values(study: Study, trial: FrozenTrial, params_file: Path) -> str:
    """The text of the params file with the trial's values."""
    source, values = trial_name(trial), study.values_of(trial)
    own = load(params_file)
    wanted = replace(own, values, source)
    text = params_file.read_bytes().decode()
    changes = {key: value for key, value in values.items() if not _has_value(own, key, value)}
    try:
        for key, value in changes.items():
            text = set_value(text, key, value)
        found = Params.model_validate(YAML(typ="safe", pure=True).load(text))
    except (YAMLError, ValidationError):
        found = None
    if found != wanted:
        listed = ", ".join(f"{key}: {as_yaml(value)}" for key, value in changes.items())
        raise UserError(
            f"{params_file}: cannot insert the values of {source}, perhaps because of anchors or aliases; insert them "
            f"by hand: {listed}"
        )
    return text


def _has_value(params: Params, key: str, value: Value) -> bool:
    try:
        return bool(value_at(params, key) == value)
    except UserError:  # a section of the key is null
        return False
