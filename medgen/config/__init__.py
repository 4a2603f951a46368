"""Sections of params.yaml: one for each stage, frozen and validated; `load` reads the file.

params = load(Path("params.yaml"), ["train.batch_size=16"])
"""

from medgen.config.base import Section, fingerprint, seed_of, without_credentials
from medgen.config.compute import Compute
from medgen.config.data import Condition, Data, IntensityWindow, Preprocess, Volume
from medgen.config.evaluation import Evaluate, LocalNetwork, Utility
from medgen.config.model import Model
from medgen.config.params import Params, load, replace, set_at, to_name
from medgen.config.parts import Features, Prior, Refiner
from medgen.config.project import RESULTS_VARIABLE, Project
from medgen.config.registry import Gates, Registry, Tracking
from medgen.config.search import Searched, TrialBudget, Tune
from medgen.config.training import Affine, Augment, Beta, Elastic, Intensity, Loss, Phase, Schedule, Train, Weights
from medgen.errors import unknown_name

__all__ = [
    "RESULTS_VARIABLE",
    "Affine",
    "Augment",
    "Beta",
    "Compute",
    "Condition",
    "Data",
    "Elastic",
    "Evaluate",
    "Features",
    "Gates",
    "Intensity",
    "IntensityWindow",
    "LocalNetwork",
    "Loss",
    "Model",
    "Params",
    "Phase",
    "Preprocess",
    "Prior",
    "Project",
    "Refiner",
    "Registry",
    "Schedule",
    "Searched",
    "Section",
    "Tracking",
    "Train",
    "TrialBudget",
    "Tune",
    "Utility",
    "Volume",
    "Weights",
    "fingerprint",
    "load",
    "replace",
    "seed_of",
    "set_at",
    "to_name",
    "unknown_name",
    "without_credentials",
]
