"""Parameter files and overrides that would fill the memory, run for minutes or end in a traceback: one message each."""

import itertools
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medgen import cli
from medgen.config import load
from medgen.errors import UserError

NAMES = "abcdefghij"


def nested(first: str, line: str) -> str:
    """Nine levels of nine aliases each: half a kilobyte that stands for 10^9 values."""
    lines = [line.format(name=name, aliases=",".join([f"*{of}"] * 9)) for of, name in itertools.pairwise(NAMES)]
    return "\n".join([f"a: &a {first}", *lines])


FILES = {
    "billion laughs": (nested("[x, x, x]", "{name}: &{name} [{aliases}]"), "aliases expand to more than 10000 values"),
    "merge keys": (nested("{x: 1}", "{name}: &{name} {{<<: [{aliases}]}}"), "aliases expand"),
    "an alias of itself": ("train: &a [*a]", "aliases expand"),
    "a deep mapping": ("train: " + "{a: " * 800 + "}" * 800, "nested too deeply"),
    "a large seed": (f"train: {{seed: {10**23}}}", "train.seed: Input should be less than 9223372036854775808"),
    "a seed of 5000 digits": ("train: {seed: " + "9" * 5000 + "}", "not readable as YAML"),
    "a date that does not exist": ("train: 2020-13-45", "not readable as YAML"),
    "code": ("train: !!python/object/apply:os.system [id]", "not readable as YAML"),
    "no text": ("\0" * 100, "not readable as YAML"),
    "a large file": ("#" * (1 << 20) + "#", "more than 1 MiB"),
    "channels": ("model: {latent_channels: 100000000000}", "model.latent_channels: .*less than or equal to 65536"),
    "depth": ("model: {blocks_per_stage: 100000}", "model.blocks_per_stage: .*less than or equal to 256"),
    "batch": ("train: {batch_size: 1000000000000000000000}", "train.batch_size: .*less than or equal to"),
    "a long value": ("train: {device: " + "x" * 100_000 + "}", "train.device"),
    "markup": ("train: {phases: {'[/x]': {epochs: 1}}}", r"train.phases.\[/x\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file(name: str, tmp_path: Path) -> None:
    text, message = FILES[name]
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        load(tmp_path / "params.yaml")
    assert len(str(raised.value)) < 1000


def test_aliases_may_be_used(tmp_path: Path) -> None:
    text = "train: {phases: {a: &a {epochs: 3, optimizer: sgd}, b: {<<: *a, epochs: 2}, c: *a}}"
    (tmp_path / "params.yaml").write_text(text)
    phases = load(tmp_path / "params.yaml").train.phases
    assert [(phase.name, phase.epochs, phase.optimizer) for phase in phases] == [
        ("a", 3, "sgd"), ("b", 2, "sgd"), ("c", 3, "sgd")
    ]  # fmt: skip


def test_no_file_but_a_folder_or_a_device(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read \\(Is a directory\\); expected a params file"):
        load(tmp_path)
    with pytest.raises(UserError, match="/dev/zero: more than 1 MiB"):
        load(Path("/dev/zero"))


def test_a_params_file_may_come_through_a_pipe(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"train: {seed: 7}")
    os.close(writer)
    assert load(Path(f"/dev/fd/{reader}")).train.seed == 7
    os.close(reader)


@pytest.mark.parametrize(
    "override",
    ["train.phases.\u00b2=1", "train.phases.\u0663=1", f"train.phases.{'9' * 5000}=1", f"train.seed={'9' * 5000}",
     "train=" + "[" * 400 + "]" * 400, "train.seed=1e23", "train.phases.a.weights=&a [*a]"],
)  # fmt: skip
def test_an_override(root: Path, override: str) -> None:
    with pytest.raises(UserError, match="train"):
        load(root / "params.yaml", [override])


@pytest.mark.parametrize("seed", ["-1", str(10**23)])
def test_the_seed_of_a_command(seed: str) -> None:
    result = CliRunner().invoke(cli.app, ["generate", "--out", "x", "--seed", seed])
    assert result.exit_code == 2
    assert "--seed" in result.output
