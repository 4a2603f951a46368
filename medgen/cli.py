"""The command line: parse arguments, call one function, turn errors into exit codes. It holds no logic.

Each command imports what it needs itself, so that `medgen --help` starts at once.
"""

import errno
import inspect
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from medgen import __version__
from medgen.errors import NonFiniteError, TrainingInterrupted, UserError, is_out_of_memory, printable
from medgen.machine import reduce_garbage_collection, set_openmp_defaults

if TYPE_CHECKING:
    from medgen.config import Project

T = TypeVar("T")

app = typer.Typer(
    help="Train, search, evaluate and ship generative models of medical images.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Create, import, check and download datasets.", no_args_is_help=True)
weights_app = typer.Typer(help="Download and check pretrained weights.", no_args_is_help=True)
recipe_app = typer.Typer(help="List, show, use and run recipes: complete parameter files.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(weights_app, name="weights")
app.add_typer(recipe_app, name="recipe")

ParamsFile = Annotated[Path, typer.Option("--params", metavar="FILE", help="Parameter file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a parameter, such as train.batch_size=16. Repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
ModelLocation = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="Folder with model/, prior/ and refiner/, or models:/NAME@ALIAS. Default: the project's model.",
    ),
]
FileFormat = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="Format of the images: png, png16, tiff, nifti or dicom. The last three keep the train images' unit.",
    ),
]
OutFolder = Annotated[Path, typer.Option("--out", metavar="DIR", file_okay=False, help="Folder to write images to.")]
DefaultFormat = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="Format of the images: png, png16, tiff, nifti or dicom. Default: png, or nifti for a model of volumes.",
    ),
]
ImageFiles = Annotated[
    list[Path],
    typer.Argument(metavar="FILE...", help="Image files; for a model of volumes also folders of DICOM series."),
]
DatasetName = Annotated[str, typer.Argument(help="Name from `medgen data list`.")]
WeightsName = Annotated[str, typer.Argument(help="Name from `medgen weights list`.")]
RecipeName = Annotated[str, typer.Argument(help="Name from `medgen recipe list`.")]
PARAMS = Path("params.yaml")


class ExportFormat(Enum):
    """Formats of `medgen export`."""

    ONNX = "onnx"
    DIFFUSERS = "diffusers"


def main() -> None:
    """Run the command line; docs/contract.md lists the exit codes."""
    set_openmp_defaults()
    reduce_garbage_collection()
    try:
        app()
    except (UserError, NonFiniteError, TrainingInterrupted) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if is_out_of_memory(error):
            text = "out of memory" + f": {' '.join(str(error).split())}" * bool(str(error))
            advice = "Lower the batch size, or give it more memory"
        elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            text = f"{error.filename or 'the disk'}: cannot be written: {error.strerror}"
            advice = "Make space there"
        else:
            raise
        print(f"error: {text}. {advice}, then run the same command again: finished work is kept", file=sys.stderr)
        sys.exit(UserError.exit_code)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"medgen {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print medgen's version and exit."),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print log messages too.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")] = False,
    log_file: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="File to append messages to.")
    ] = None,
) -> None:
    """Options that stand before the command."""
    if verbose or quiet or log_file:
        from medgen import console

        console.configure(verbose, quiet, log_file)


@app.command()
def init(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", file_okay=False, help="Folder of the project; created if it is missing.")
    ],
    recipe: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Recipe for params.yaml. Default: parameters of the sample project."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Folder, zip or tar of images to import into the project.")
    ] = None,
) -> None:
    """Create a project: parameters, pipeline, git and DVC in a folder of its own."""
    from medgen.projects import init

    init.init(folder, recipe, data)


@app.command()
def doctor(params: ParamsFile = PARAMS, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check this machine and this project, and say how to fix each problem."""
    from medgen import doctor

    findings = _call(doctor.run, params, overrides)
    healthy = doctor.show(findings, as_json)
    raise typer.Exit(0 if healthy else 2)


@app.command(hidden=True)
def code() -> None:
    """Write the hashes of the source code of each stage, on which dvc.yaml's stages depend."""
    from medgen import source

    source.run(_project())


@app.command()
def preprocess(params: ParamsFile = PARAMS, overrides: Overrides = None) -> None:
    """Convert image files to the dataset store (stage 1)."""
    from medgen.ingest import preprocess

    _call(preprocess.run, params, overrides)


@app.command()
def features(params: ParamsFile = PARAMS, overrides: Overrides = None) -> None:
    """Train the domain extractor, the feature network of the metrics (stage 2)."""
    from medgen.training import extractor

    if not _launch("features", params, overrides):
        _call(extractor.run, params, overrides)


@app.command()
def train(params: ParamsFile = PARAMS, overrides: Overrides = None) -> None:
    """Train the model, or resume an interrupted training (stage 3)."""
    from medgen import registry
    from medgen.training import train

    if not _launch("train", params, overrides):
        _call(train.run, params, overrides, fetch=_call(registry.fetcher, params, overrides))


@app.command()
def prior(params: ParamsFile = PARAMS, overrides: Overrides = None) -> None:
    """Fit or train the prior, from which latents are drawn (stage 4)."""
    from medgen.training import prior

    if not _launch("prior", params, overrides):
        _call(prior.run, params, overrides)


@app.command()
def refiner(params: ParamsFile = PARAMS, overrides: Overrides = None) -> None:
    """Train the refiner, which adds the fine detail that the decoder loses (stage 5)."""
    from medgen.training import refiner

    if not _launch("refiner", params, overrides):
        _call(refiner.run, params, overrides)


@app.command()
def utility(params: ParamsFile = PARAMS, overrides: Overrides = None) -> None:
    """Train classifiers and U-Nets on real images and on samples, and compare them on the test split (stage 6)."""
    from medgen.evaluation import utility

    _call(utility.run, params, overrides)


@app.command()
def evaluate(
    model: Annotated[
        str | None,
        typer.Option(metavar="VERSION", help="Evaluate a registered version instead, such as models:/medgen@champion."),
    ] = None,
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Evaluate the model on the test split and register it as the candidate (stage 7)."""
    from medgen import registry
    from medgen.evaluation import evaluate

    if model is None:
        if not _launch("evaluate", params, overrides) and _call(evaluate.run, params, overrides) is not None:
            _call(registry.register_if_enabled, params, overrides)
    else:
        with _call(registry.fetch_for_evaluation, params, overrides, source=model) as (version, folder):
            _call(evaluate.evaluate_version, params, overrides, folder=folder)
            _call(registry.update_metrics, params, overrides, version=version, folder=folder)


@app.command()
def generate(
    out: OutFolder,
    n: Annotated[
        int | None,
        typer.Option("--n", min=1, help="Number of images, 25 by default; with --traverse, 9 along each axis."),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Class name or index. Default: all classes, as often as in the train split.")
    ] = None,
    conditions: Annotated[
        list[str] | None,
        typer.Option(
            "--set-condition",
            metavar="NAME=VALUE,...",
            help="Further conditions, such as view=AP,sex=F; of a mask or image a file. Repeatable. Default: none.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the random draws.")] = 0,
    interpolate: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A B", help="Interpolate from image file A to image file B in latent space instead."),
    ] = None,
    traverse: Annotated[
        bool, typer.Option("--traverse", help="Vary the latent along its principal axes instead.")
    ] = False,
    refine: Annotated[
        bool,
        typer.Option(help="Apply the refiner to new images. --interpolate and --traverse never use it."),
    ] = True,
    file_format: FileFormat = "png",
    model: ModelLocation = None,
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Generate new images, or move through latent space between two images or along its axes."""
    from medgen import registry
    from medgen.serving import generate

    if interpolate and traverse:
        raise typer.BadParameter("--interpolate and --traverse exclude each other; give one of them")
    if traverse and file_format != "png":
        raise typer.BadParameter("--traverse writes a PNG grid and a GIF only; leave out --format")
    if conditions and (interpolate or traverse):
        raise typer.BadParameter("--set-condition is for new images; leave it out with --interpolate and --traverse")
    folder = _call(registry.find_model, params, overrides, source=model)
    options: dict[str, Any] = {"label": label} | ({} if n is None else {"n": n})
    if interpolate:
        generate.interpolate(folder, out, ends=interpolate, file_format=file_format, **options)
    elif traverse:
        generate.traverse(folder, out, **options)
    else:
        condition = ",".join(conditions or ())
        generate.run(folder, out, seed=seed, refine=refine, file_format=file_format, condition=condition, **options)


@app.command()
def reconstruct(
    files: ImageFiles,
    out: OutFolder,
    label: Annotated[
        str | None,
        typer.Option(help="Class name or index of all files, for a model that uses labels. Default: folder names."),
    ] = None,
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="With png16, tiff, nifti or dicom, write each reconstruction also as a file of that format.",
        ),
    ] = "png",
    uncertainty: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            help="Also write the standard deviation of N draws from a variational model's posterior.",
        ),
    ] = None,
    model: ModelLocation = None,
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Encode and decode image files; write original and reconstruction side by side, with PSNR and SSIM."""
    from medgen import registry
    from medgen.serving import generate

    folder = _call(registry.find_model, params, overrides, source=model)
    generate.reconstruct(folder, out, files=files, label=label, file_format=file_format, uncertainty=uncertainty or 0)


@app.command()
def anomaly(
    files: ImageFiles,
    out: OutFolder,
    label: Annotated[
        str | None,
        typer.Option(help="Class that counts as normal, by name or index, for a model or prior that uses labels."),
    ] = None,
    model: ModelLocation = None,
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Score how far image files are from the train images, and write maps of where they differ (docs/uses.md)."""
    from medgen import registry
    from medgen.serving import uses

    folder = _call(registry.find_model, params, overrides, source=model)
    uses.anomaly(folder, out, files=files, label=label)


@app.command()
def counterfactual(
    files: ImageFiles,
    out: OutFolder,
    to: Annotated[str, typer.Option(metavar="NAME", help="Class name or index that the images are changed to.")],
    label: Annotated[str | None, typer.Option(help="Class name or index of all files. Default: folder names.")] = None,
    file_format: DefaultFormat = None,
    model: ModelLocation = None,
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Write the same images with another label (docs/uses.md)."""
    from medgen import registry
    from medgen.serving import uses

    folder = _call(registry.find_model, params, overrides, source=model)
    uses.counterfactual(folder, out, files=files, to=to, label=label, file_format=file_format)


@app.command()
def inpaint(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Image file, or a folder of a DICOM series.")],
    mask: Annotated[
        Path, typer.Option(metavar="FILE", help="Image file of the same size: black where pixels are kept, else white.")
    ],
    out: OutFolder,
    label: Annotated[
        str | None,
        typer.Option(help="Class name or index of the file, for a model or prior that uses labels."),
    ] = None,
    file_format: DefaultFormat = None,
    model: ModelLocation = None,
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Fill the part of an image that a mask covers (docs/uses.md)."""
    from medgen import registry
    from medgen.serving import uses

    folder = _call(registry.find_model, params, overrides, source=model)
    uses.inpaint(folder, out, file=file, mask=mask, label=label, file_format=file_format)


@app.command()
def export(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", file_okay=False, help="Folder to write the files to.")],
    format: Annotated[
        ExportFormat, typer.Option("--format", help="onnx: encoder and decoder; diffusers: its AutoencoderKL.")
    ],
    model: ModelLocation = None,
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Write the model for other programs, as ONNX or as a folder of diffusers (docs/weights.md)."""
    from medgen import registry
    from medgen.serving import export

    folder = _call(registry.find_model, params, overrides, source=model)
    export.export(folder, out, format=format.value)


@app.command()
def tune(
    trials: Annotated[int, typer.Option(min=1, help="Total number of trials in the study.")] = 50,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of processes on this machine. Default: one per GPU, or one.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(min=0, help="Start no trial after this many seconds.")] = None,
    confirm: Annotated[
        int, typer.Option(min=0, help="Train this many of the best trials in full and choose the winner among them.")
    ] = 0,
    apply: Annotated[bool, typer.Option("--apply", help="Write the winner's values into the parameter file.")] = False,
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Search for better parameters; run the same command again to continue (docs/tune.md)."""
    from medgen import tune

    options: dict[str, Any] = {
        "trials": trials,
        "workers": workers,
        "timeout": timeout,
        "confirm": confirm,
        "apply": apply,
    }
    _call(tune.run, params, overrides, file=params, **options)


@app.command()
def compare(as_json: AsJson = False) -> None:
    """Show runs side by side: the parameters that differ, and the metrics."""
    from medgen.tracking import compare

    compare.compare(_project(), as_json=as_json)


@app.command()
def register(params: ParamsFile = PARAMS, overrides: Overrides = None) -> None:
    """Register the model, its prior and its refiner in MLflow as the candidate."""
    from medgen import registry

    _call(registry.register, params, overrides)


@app.command()
def promote(
    version: Annotated[int | None, typer.Option(min=1, help="Version number. Default: the candidate.")] = None,
    force: Annotated[
        str | None, typer.Option(metavar="REASON", help="Promote even if gates fail; the reason is recorded.")
    ] = None,
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Make a registered version the champion if it passes all gates (docs/registry.md)."""
    from medgen.registry import promotion

    _call(promotion.promote, params, overrides, version=version, force=force)


@app.command()
def rollback(
    why: Annotated[str, typer.Option(help="Reason, recorded in the history.")] = "rolled back",
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Make the previous champion the champion again."""
    from medgen.registry import promotion

    _call(promotion.rollback, params, overrides, why=why)


@app.command()
def history(
    dataset: Annotated[
        str | None,
        typer.Option(metavar="HASH", help="Show only versions trained on the dataset with this fingerprint or md5."),
    ] = None,
    reproduce: Annotated[
        int | None,
        typer.Option(metavar="VERSION", min=1, help="Print the commands that rebuild this version instead."),
    ] = None,
    run: Annotated[bool, typer.Option("--run", help="With --reproduce: rebuild the version and compare.")] = False,
    as_json: AsJson = False,
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Show the registered versions, the origin of each, and all promotions with their reasons."""
    from medgen.registry import promotion
    from medgen.registry import reproduce as reproduction

    if reproduce is None:
        if run:
            raise typer.BadParameter("--run needs --reproduce VERSION")
        _call(promotion.history, params, overrides, dataset=dataset, as_json=as_json)
    else:
        _call(reproduction.reproduce, params, overrides, version=reproduce, run=run)


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Option("--model", metavar="URI", help="models:/NAME@ALIAS. Default: the champion.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 means all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 chooses a free one.")] = 8080,
    follow: Annotated[
        bool, typer.Option("--follow", help="Change to the version that the alias names, without losing a request.")
    ] = False,
    tokens: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with a client's name and token on each line; only these clients are served. Default: the "
            "content of MEDGEN_SERVE_TOKENS.",
        ),
    ] = None,
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Serve a registered version over HTTP (docs/serving.md)."""
    from medgen import registry

    _call(registry.serve, params, overrides, model=model, host=host, port=port, follow=follow, tokens=tokens)


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="Port on the loopback address.")] = 5000,
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Open MLflow's web page for this project."""
    from medgen import registry

    _call(registry.ui, params, overrides, port=port)


@app.command()
def sync(params: ParamsFile = PARAMS, overrides: Overrides = None) -> None:
    """Send the records that MLflow has missed."""
    from medgen import tracking

    _call(tracking.sync, params, overrides)


@data_app.command()
def sample(
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the drawn patients.")] = 0,
    n: Annotated[int, typer.Option("--n", min=3, help="Number of images.")] = 480,
) -> None:
    """Draw the sample dataset: procedural chest X-rays in three classes."""
    from medgen.datasets import import_data

    _call(import_data.draw_sample, params, overrides, num_images=n, seed=seed, file=params)


@data_app.command("import")
def import_data(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="Folder, zip or tar of images, or its s3:// address; docs/data.md lists the layouts."
        ),
    ],
    name: Annotated[
        str | None, typer.Option(help="The dataset's name, written to data.name. Default: the name of PATH.")
    ] = None,
    params: ParamsFile = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Copy a folder or archive of images into the project as its dataset."""
    from medgen.datasets import import_data

    _call(import_data.import_folder, params, overrides, source=path, name=name, file=params)


@data_app.command()
def audit(
    path: Annotated[
        str | None,
        typer.Argument(metavar="PATH", help="Folder of images, or its s3:// address. Default: the project's data."),
    ] = None,
    params: ParamsFile = PARAMS,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of audit.html and audit.json. Default: reports/.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with code 2 if the splits leak.")] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Check images for leaks between splits, duplicates, wrong labels, odd and unreadable files."""
    from medgen.ingest import audit

    required = path is None or params != PARAMS  # a folder can be checked before there is a project
    _call(audit.run, params, overrides, required, path=path, out=out, strict=strict, as_json=as_json)


@data_app.command("verify")
def verify_dataset(
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Preprocessed dataset. Default: artifacts/dataset.")
    ] = None,
) -> None:
    """Check the SHA-256 of every file of the preprocessed dataset."""
    from medgen.data import store

    store.verify_store(folder or _project().dataset)


@data_app.command("list")
def list_datasets(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show all details of this dataset instead.")
    ] = None,
) -> None:
    """List the known datasets, or show content, licence and source of one."""
    from medgen.datasets import catalog

    catalog.show() if name is None else catalog.show_dataset(name)


@data_app.command("fetch")
def fetch_dataset(name: DatasetName, params: ParamsFile = PARAMS, overrides: Overrides = None) -> None:
    """Download a known dataset and make it the project's dataset."""
    from medgen.datasets import fetch

    _call(fetch.fetch, params, overrides, name=name, file=params)


@weights_app.command("list")
def list_weights() -> None:
    """List the known weights and whether this machine has them."""
    from medgen.datasets import weights

    weights.show_weights()


@weights_app.command("fetch")
def fetch_weights(name: WeightsName) -> None:
    """Download pretrained weights and check their SHA-256."""
    from medgen.datasets import weights

    weights.fetch_weights(name)


@weights_app.command("verify")
def verify_weights(
    name: Annotated[str | None, typer.Argument(help="Default: all weights on this machine.")] = None,
) -> None:
    """Check the SHA-256 of weights on this machine."""
    from medgen.datasets import weights

    weights.verify_weights(name)


@recipe_app.command("list")
def list_recipes() -> None:
    """List the recipes."""
    from medgen.projects import recipes

    for name, line in recipes.list_recipes().items():
        print(f"{name:29}{line}")


@recipe_app.command("show")
def show_recipe(name: RecipeName) -> None:
    """Print a recipe."""
    from medgen.projects import recipes

    print(recipes.read(name), end="")


@recipe_app.command("use")
def use_recipe(name: RecipeName) -> None:
    """Write a recipe to params.yaml."""
    from medgen.projects import recipes

    recipes.use(name, _project())


@recipe_app.command("run")
def run_recipes(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names from `medgen recipe list`.")],
    overrides: Overrides = None,
) -> None:
    """Train and evaluate recipes one after another, and print their metrics in one table."""
    from medgen.projects import recipes

    recipes.run(_project(), names, overrides or ())


def _call(
    function: Callable[..., T], params_file: Path, overrides: list[str] | None, required: bool = True, **options: Any
) -> T:
    """Call `function` with the project, the params sections in its signature, and the command's own options.

    A params file that is missing and not `required` means default values.
    """
    from medgen.config import Params, load

    params = load(params_file, overrides or (), required)
    wanted = inspect.signature(function).parameters
    sections = {name: getattr(params, name) for name in Params.model_fields if name in wanted and name not in options}
    if "params" in wanted:
        sections["params"] = params
    return function(_project(), **sections, **options)


def _launch(stage: str, params_file: Path, overrides: list[str] | None) -> bool:
    """Run this command in the processes that compute.processes asks for; False if this process has to do the work."""
    from medgen.config import load
    from medgen.training.launch import launch

    return launch(main, load(params_file, overrides or ()), stage)


def _project() -> "Project":
    from medgen.config import Project

    return Project.find(Path.cwd())
