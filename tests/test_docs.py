"""The documentation is made from the code: parameters, error messages, the notebook, the citation."""

import ast
import importlib.util
import json
import re
import shutil
import tomllib

import pytest

import medgen
from medgen.config import Project
from medgen.metrics import c2st

PLACEHOLDER = "…"


@pytest.fixture
def site(root):
    """docs/site.py as a module."""
    spec = importlib.util.spec_from_file_location("site_hook", root / "docs" / "site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_parameter_reference_is_that_of_the_schema(root, site):
    written = (root / "docs" / "parameters.md").read_text(encoding="utf-8")
    assert written == site.parameters(), "run `python docs/site.py`"


def test_the_parameter_reference_lists_every_key_with_its_default_and_meaning(site):
    text = site.parameters()
    for row in (
        "| `clip_norm` | number, above 0 | `1` |  |",
        "| `leaks` | `warn`, `error`, `move` | `warn` | patients, duplicates and near-duplicates in two splits; move: "
        "to the split that has most of their images |",
        "| `num_embeddings` | whole number, at least 1, at most 65536 | `512` | vqvae: size of the codebook |",
        "| `weights` | [loss.weights](#lossweights) | `l1: 1, ssim: 0.5` |  |",
    ):
        assert row in text
    for link in re.findall(r"\]\(#(\w+)\)", text):
        assert re.search(rf"^#+ {link}$", text.replace(".", ""), re.M), link


def test_links_lead_to_pages_of_the_site(root, site):
    """GitHub's links are kept within the site, and leave it for no file that it does not have."""

    class Page:
        class file:
            src_uri = "index.md"

    text = (
        "[a](docs/data.md#layouts) [b](CONTRIBUTING.md) [c](compose.yaml) ![d](docs/images/samples.png)\n- one\n- two"
    )
    found = site.on_page_markdown(text, Page)
    assert found.splitlines()[0] == "[a](data.md#layouts) [b](contributing.md) c ![d](images/samples.png)"
    assert found.endswith("\n\n- one\n- two")
    assert site.on_page_markdown("```sh\n[a](compose.yaml)\n- b\n```", Page) == "```sh\n[a](compose.yaml)\n- b\n```"


def test_every_page_is_in_the_navigation(root, site):
    navigation = (root / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    pages = {path.name for path in (root / "docs").glob("*.md")} | {*site.OUTSIDE, "reference.md"}
    assert set(re.findall(r"\S+\.md", navigation)) == pages


def messages(folder):
    """Text of the package's string constants, with … for each value of an f-string."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else PLACEHOLDER for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_faqs_errors_are_those_of_the_code(root):
    errors = re.findall(r"^> (.*)$", (root / "docs" / "faq.md").read_text(encoding="utf-8"), re.M)
    assert len(errors) >= 10
    known = "\n".join(messages(root / "medgen"))
    for error in errors:
        for part in filter(None, (part.strip(" ',;:.()") for part in error.split(PLACEHOLDER))):
            assert part in known, f"{error}: {part!r} is in no message"


def test_the_citation_and_the_changelog_name_this_version(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    assert project["version"] == medgen.__version__
    assert f"version: {medgen.__version__}\n" in citation
    assert f"license: {project['license']}\n" in citation
    assert f"## {medgen.__version__}\n" in (root / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def notebook(root):
    """Code cells of the example notebook."""
    content = json.loads((root / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_runs_in_a_project(notebook, patients_store, trained, tmp_path, monkeypatch, capsys):
    """Its cells are executed one by one, without Jupyter, which a test environment need not have."""
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    monkeypatch.setattr(plt, "show", lambda: None)
    monkeypatch.setattr(c2st, "_STEPS", 2)
    monkeypatch.chdir(tmp_path)
    project = Project(tmp_path)
    shutil.copytree(patients_store, project.dataset)
    trained(project)
    # the record of checked files is written once the files are two seconds old
    files = lambda: {path for path in tmp_path.rglob("*") if path.name != "dataset.checked.json"}  # noqa: E731
    before = files()
    names: dict[str, object] = {}
    for cell in notebook:
        exec("".join(cell["source"]), names)
    assert len(plt.get_fignums()) == 6
    plt.close("all")
    assert "equal to reconstruct: True" in capsys.readouterr().out
    assert files() == before, "the notebook writes no files"


def test_the_notebook_is_small_and_has_output_of_the_sample_data(root, notebook):
    text = (root / "docs" / "notebook.ipynb").read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert sum("image/png" in output.get("data", {}) for cell in notebook for output in cell["outputs"]) == 6
    assert not any(output["output_type"] == "error" for cell in notebook for output in cell["outputs"])
    assert "phantom-chest" in text
    assert not re.search(r"/(tmp|work|home|root)/", text)
