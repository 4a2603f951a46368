"""Start the HTTP server of one model folder; `medgen serve` runs this file.

    python -P medgen/serving/app.py FOLDER --temporary FOLDER --fd 3 --about '{"uri": "models:/medgen/3", …}'

The folder server/ is loaded as a package of its own name, because importing medgen.serving.server would import the
installed medgen, and the model must run with the medgen code in its own folder. -P keeps the modules next to this file
from hiding others of the same name.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType

NAME = "medgen_http_server"

if __name__ == "__main__":
    package = ModuleType(NAME)
    package.__path__ = [str(Path(__file__).parent / "server")]
    sys.modules[NAME] = package
    importlib.import_module(f"{NAME}.main").main()
