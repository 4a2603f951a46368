"""The search of the campaign: `medgen tune` with one worker, and the values of its trials."""

from pathlib import Path
from typing import Any

from benchmarks.campaign.process import Violation

SEARCH = ("tune", "--trials", "3", "--workers", "1")


def trials_of(project: Path, url: str | None = None) -> dict[int, Any]:
    """State, parameters and values of each trial by its number; of the project's journal, or of a database."""
    import optuna
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    storage = RDBStorage(url) if url else JournalStorage(JournalFileBackend(str(project / "optuna.journal")))
    (study,) = optuna.get_all_study_summaries(storage)
    trials = optuna.load_study(study_name=study.study_name, storage=storage).trials
    return {trial.number: (trial.state.name, trial.params, trial.values) for trial in trials}


def check_trials(project: Path, expected: dict[int, Any], url: str | None = None) -> None:
    """Raise Violation unless the search has the same trials as without faults."""
    found = trials_of(project, url)
    if found != expected:
        raise Violation("lost", f"trials {found}, expected {expected}")
