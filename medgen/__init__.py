"""medgen: train, search, evaluate and ship generative models of medical images.

dataset = medgen.open_dataset("artifacts/dataset")
model = medgen.load("models:/NAME@champion")
images = model.sample(16, label="NORMAL", seed=0)
metrics = medgen.evaluate(images, dataset.split("test"))
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["Model", "Split", "Store", "UserError", "evaluate", "load", "open_dataset"]

if TYPE_CHECKING:
    from medgen.data.store import Split, Store
    from medgen.errors import UserError
    from medgen.evaluation.image_sets import evaluate
    from medgen.serving.api import Model, load, open_dataset
else:
    # imported on first use: `import medgen` and the commands do not wait for torch
    _MODULES = {
        "medgen.data.store": ("Split", "Store"),
        "medgen.errors": ("UserError",),
        "medgen.evaluation.image_sets": ("evaluate",),
        "medgen.serving.api": ("Model", "load", "open_dataset"),
    }

    def __getattr__(name):
        from importlib import import_module

        for module, names in _MODULES.items():
            if name in names:
                return getattr(import_module(module), name)
        raise AttributeError(f"module 'medgen' has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})
