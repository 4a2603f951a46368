"""The command line: parses words, calls one verb, turns errors into exit codes. Holds no logic.

Everything heavy is imported by the verb that needs it, so that `medgen --help` answers at once.
"""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from medgen.errors import NonFiniteError, TrainingInterrupted, UserError, printable

if TYPE_CHECKING:
    from medgen.config import Project

T = TypeVar("T")

app = typer.Typer(
    help="Train, search, judge and ship generative models of medical images.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Bring images in.", no_args_is_help=True)
weights_app = typer.Typer(help="Pretrained weights.", no_args_is_help=True)
recipe_app = typer.Typer(help="Complete params files.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(weights_app, name="weights")
app.add_typer(recipe_app, name="recipe")

ParamsFile = Annotated[Path, typer.Option("--params", metavar="FILE", help="The params file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Overrides a parameter, as train.batch_size=16. Repeats."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ModelPlace = Annotated[
    str | None,
    typer.Option("--model", metavar="PLACE", help="A folder with model/, prior/, refiner/; or models:/NAME@ALIAS."),
]
OutFolder = Annotated[Path, typer.Option("--out", metavar="DIR", file_okay=False, help="Where the pictures go.")]
PARAMS = Path("params.yaml")


def main() -> None:
    """Runs the command line; see docs/contract.md for the exit codes."""
    try:
        app()
    except (UserError, NonFiniteError, TrainingInterrupted) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)


@app.command()
def doctor(params: ParamsFile = PARAMS, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check this machine and project, and say how to mend what is wrong."""
    from medgen import doctor

    findings = _call(doctor.run, params, overrides)
    healthy = doctor.show(findings, as_json)
    raise typer.Exit(0 if healthy else 2)


@app.command()
def preprocess(params: ParamsFile = PARAMS, overrides: Overrides = None) -> None:
    """Turn image files into the uint8 store (stage 1)."""
    from medgen.ingest import preprocess

    _call(preprocess.run, params, overrides)


@app.command()
def features(params: ParamsFile = PARAMS, overrides: Overrides = None) -> None:
    """Train the domain extractor that judges samples (stage 2)."""
    from medgen.training import extractor

    _call(extractor.run, params, overrides)


@app.command()
def train(params: ParamsFile = PARAMS, overrides: Overrides = None) -> None:
    """Train the model; the same command again resumes (stage 3)."""
    from medgen.training import train

    _call(train.run, params, overrides)


@app.command()
def prior(params: ParamsFile = PARAMS, overrides: Overrides = None) -> None:
    """Fit the prior that latents are drawn from (stage 4)."""
    from medgen.training import prior

    _call(prior.run, params, overrides)


@app.command()
def refiner(params: ParamsFile = PARAMS, overrides: Overrides = None) -> None:
    """Train the refiner that adds the detail which the decoder leaves out (stage 5)."""
    from medgen.training import refiner

    _call(refiner.run, params, overrides)


@app.command()
def evaluate(
    model: Annotated[
        str | None, typer.Option(metavar="VERSION", help="Instead: a registered one, such as models:/medgen@champion.")
    ] = None,
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Judge the model on the test split and register it as candidate (stage 6)."""
    from medgen import registry
    from medgen.evaluation import evaluate

    if model is None:
        _call(evaluate.run, params, overrides)
        _call(registry.register_if_wanted, params, overrides)
    else:
        version, folder = _call(registry.fetch_to_judge, params, overrides, place=model)
        _call(evaluate.judge_version, params, overrides, folder=folder)
        _call(registry.take_metrics, params, overrides, version=version, folder=folder)


@app.command()
def generate(
    out: OutFolder,
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="How many (25); with --traverse, along each axis (9).")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Class by name or index; without it, as in the train split.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same images.")] = 0,
    interpolate: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A B", help="Instead: the way from image A to image B.")
    ] = None,
    traverse: Annotated[bool, typer.Option("--traverse", help="Instead: what the latent's main axes do.")] = False,
    refine: Annotated[
        bool,
        typer.Option(help="Add the refiner's detail to new images; --interpolate and --traverse never do."),
    ] = True,
    model: ModelPlace = None,
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Make new images, one PNG each and one grid; or follow the latents between two images or along their axes."""
    from medgen import registry
    from medgen.serving import generate

    if interpolate and traverse:
        raise typer.BadParameter("--interpolate and --traverse are two things to do; give one of them")
    folder = _call(registry.find_model, params, overrides, place=model)
    words = {"label": label, "model": folder, "out": out} | ({} if n is None else {"n": n})
    if interpolate:
        _call(generate.interpolate, params, overrides, ends=interpolate, **words)
    elif traverse:
        _call(generate.traverse, params, overrides, **words)
    else:
        _call(generate.run, params, overrides, seed=seed, refine=refine, **words)


@app.command()
def reconstruct(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...")],
    out: OutFolder,
    label: Annotated[
        str | None,
        typer.Option(help="Their class by name or index, for a model that looks at labels; else by their folders."),
    ] = None,
    model: ModelPlace = None,
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Put images through the model, without its refiner: original beside reconstruction, PSNR and SSIM each."""
    from medgen import registry
    from medgen.serving import generate

    folder = _call(registry.find_model, params, overrides, place=model)
    _call(generate.reconstruct, params, overrides, files=files, label=label, model=folder, out=out)


@app.command()
def tune(
    trials: Annotated[int, typer.Option(min=1, help="Total number of trials in the study.")] = 50,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine; by default one for each GPU, or one.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds after which no trial begins.")] = None,
    confirm: Annotated[
        int, typer.Option(min=0, help="Train this many of the best in full, and choose the winner among them.")
    ] = 0,
    apply: Annotated[bool, typer.Option("--apply", help="Write the best values into the params file.")] = False,
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Search for better parameters; run again, it continues (docs/tune.md)."""
    from medgen import tune

    words = {"trials": trials, "workers": workers, "timeout": timeout, "confirm": confirm, "apply": apply}
    _call(tune.run, params, overrides, file=params, **words)


@app.command()
def compare(as_json: AsJson = False) -> None:
    """Show runs side by side: parameters that differ, metrics."""
    from medgen.tracking import compare

    compare.compare(_project(), as_json=as_json)


@app.command()
def register(params: ParamsFile = PARAMS, overrides: Overrides = None) -> None:
    """Register the model, its prior and its refiner in MLflow, as candidate."""
    from medgen import registry

    _call(registry.run, params, overrides)


@app.command()
def promote(
    version: Annotated[int | None, typer.Option(min=1, help="Its number; without it, the candidate.")] = None,
    force: Annotated[
        str | None, typer.Option(metavar="WHY", help="Promote although gates do not hold; the reason is recorded.")
    ] = None,
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Make a registered version the champion, if it holds all gates (docs/registry.md)."""
    from medgen.registry import promotion

    _call(promotion.promote, params, overrides, version=version, force=force)


@app.command()
def rollback(
    why: Annotated[str, typer.Option(help="Recorded in the history.")] = "rolled back",
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Make the champion before this one champion again."""
    from medgen.registry import promotion

    _call(promotion.rollback, params, overrides, why=why)


@app.command()
def history(
    dataset: Annotated[
        str | None, typer.Option(metavar="HASH", help="Only versions trained on it: its fingerprint or md5.")
    ] = None,
    reproduce: Annotated[
        int | None, typer.Option(metavar="VERSION", min=1, help="Instead: the commands that rebuild a version.")
    ] = None,
    run: Annotated[bool, typer.Option("--run", help="With --reproduce: rebuild it, and compare.")] = False,
    as_json: AsJson = False,
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Show the registered versions, what each was made from, and who became champion when and why."""
    from medgen.registry import promotion
    from medgen.registry import reproduce as rebuilding

    if reproduce is None:
        if run:
            raise typer.BadParameter("--run rebuilds a version; name it with --reproduce VERSION")
        _call(promotion.history, params, overrides, dataset=dataset, as_json=as_json)
    else:
        _call(rebuilding.reproduce, params, overrides, version=reproduce, run=run)


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Option("--model", metavar="URI", help="models:/NAME@ALIAS; without it, the champion.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")] = 8080,
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Answer HTTP requests with a registered version's images (docs/serving.md)."""
    from medgen import registry

    _call(registry.serve, params, overrides, model=model, host=host, port=port)


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="On this machine's loopback address.")] = 5000,
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Open MLflow's web page on this project's runs."""
    from medgen import registry

    _call(registry.ui, params, overrides, port=port)


@app.command()
def sync(params: ParamsFile = PARAMS, overrides: Overrides = None) -> None:
    """Send to MLflow what it missed."""
    from medgen import tracking

    _call(tracking.sync, params, overrides)


@data_app.command()
def sample(
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(help="Which patients.")] = 0,
    n: Annotated[int, typer.Option("--n", min=3, help="How many images.")] = 480,
) -> None:
    """Draw the sample dataset: procedural chest films in three classes."""
    from medgen.datasets import import_data

    _call(import_data.draw_sample, params, overrides, num_images=n, seed=seed)


@data_app.command("import")
def import_data(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A folder, zip or tar of images; see docs/data.md for layouts.")
    ],
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Make a folder or archive of images this project's dataset."""
    from medgen.datasets import import_data

    _call(import_data.import_folder, params, overrides, source=path)


@data_app.command()
def audit(
    path: Annotated[
        Path | None, typer.Argument(metavar="PATH", help="A folder; without it, the project's data.")
    ] = None,
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Look through images for leaks, duplicates, wrong labels, odd and broken files."""
    from medgen.ingest import audit

    _call(audit.run, params, overrides, path=path, as_json=as_json)


@data_app.command("list")
def list_datasets() -> None:
    """Show the known datasets: what is in them, their licences and where they come from."""
    from medgen.datasets import catalog

    catalog.show()


@data_app.command("fetch")
def fetch_dataset(name: str, params: ParamsFile = PARAMS, overrides: Overrides = None) -> None:
    """Download a known dataset and make it this project's."""
    from medgen.datasets import fetch

    _call(fetch.fetch, params, overrides, name=name)


@weights_app.command("list")
def list_weights() -> None:
    """Show the known weights and whether they are here."""
    from medgen.datasets import weights

    weights.show_weights()


@weights_app.command("fetch")
def fetch_weights(name: str) -> None:
    """Download weights and check them."""
    from medgen.datasets import weights

    weights.fetch_weights(name)


@weights_app.command("verify")
def verify_weights(name: Annotated[str | None, typer.Argument(help="Without it: all that are here.")] = None) -> None:
    """Check weights against their hash."""
    from medgen.datasets import weights

    weights.verify(name)


@recipe_app.command("list")
def list_recipes() -> None:
    """Name the recipes."""
    from medgen import recipes

    for name, line in recipes.known().items():
        print(f"{name:24} {line}")


@recipe_app.command("show")
def show_recipe(name: str) -> None:
    """Print a recipe."""
    from medgen import recipes

    print(recipes.read(name), end="")


@recipe_app.command("use")
def use_recipe(name: str) -> None:
    """Write a recipe to params.yaml."""
    from medgen import recipes

    recipes.use(name, _project())


@recipe_app.command("run")
def run_recipes(
    names: Annotated[list[str], typer.Argument(metavar="NAME...")],
    overrides: Overrides = None,
) -> None:
    """Train and judge recipes one after another, and print their metrics in one table."""
    from medgen import recipes

    recipes.run(_project(), names, overrides or ())


def _call(verb: Callable[..., T], params_file: Path, overrides: list[str] | None, **options: Any) -> T:
    """Calls `verb` with the project, the params sections that its signature names, and the command's own options."""
    from medgen.config import Params, load

    params = load(params_file, overrides or ())
    wanted = inspect.signature(verb).parameters
    sections = {name: getattr(params, name) for name in Params.model_fields if name in wanted and name not in options}
    if "params" in wanted:
        sections["params"] = params
    return verb(_project(), **sections, **options)


def _project() -> "Project":
    from medgen.config import Project

    return Project(Path.cwd())
