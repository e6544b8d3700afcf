"""What the README says is run, and what it shows is there."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import __main__ as command
from experiments import runner
from lazyjax import matrix

README = (Path(__file__).parent.parent / "README.md").read_text()


def run(*numbers):
    code = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {}
    with jax.numpy_rank_promotion("allow"):  # Flax layers promote their biases
        for number in numbers:
            exec(code[number], names)
    return names


@pytest.mark.thorough
def test_the_own_model_of_the_readme_runs_and_says_how_lazy_it_was(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(0)
    printed = capsys.readouterr().out
    (shown,) = re.findall(r"^    (lazy: .*)$", README, flags=re.MULTILINE)
    assert printed == f"{shown}\n"
    assert "compared.plot()" in README
    assert set(names["compared"].plot()) >= {"functions"}
    assert str(names["page"]) == "lazy/index.html"
    assert shown in names["page"].read_text()
    (block,) = re.findall(r"```python\n(import flax.*?compared.report.*?)```", README, re.DOTALL)
    own = [line for line in block.splitlines() if line and not line.startswith("import")]
    assert len(own) == 8


@pytest.mark.thorough
def test_the_kernels_of_the_readme_are_there_and_agree(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(1, 2)
    assert names["kernel"].shape == (8, 8, 10, 10)
    mean = np.einsum("nmkk->nm", names["kernel"]) / 10
    np.testing.assert_allclose(names["traced"], mean, rtol=1e-4, atol=1e-4 * mean.max())
    assert "784 positions" in capsys.readouterr().out
    np.testing.assert_allclose(names["stored"], mean, rtol=1e-4, atol=1e-4 * mean.max())
    square = np.asarray(matrix(names["kernel"]))
    residual = np.asarray(names["labels"] - names["f"](names["params"], names["images"]))
    solved = square @ names["c"].reshape(-1) + 0.1 * names["c"].reshape(-1)
    np.testing.assert_allclose(solved, residual.reshape(-1), atol=2e-3 * np.abs(residual).max())
    assert names["z"].shape == (8, 10, 512)


def test_the_readme_names_every_experiment_and_no_other(capsys):
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", README, flags=re.MULTILINE)
    table = runner.discover()
    assert [name for name, _ in rows] == list(table)
    for name, question in rows:
        assert question == runner.question(table[name])
    assert command.main(["table"]) == 0
    assert capsys.readouterr().out in README


def test_a_command_puts_the_table_into_the_readme(tmp_path, capsys):
    file = tmp_path / "README.md"
    file.write_text(re.sub(r"\| `width_sweep` .*\n", "", README))
    assert command.main(["table", str(file)]) == 0
    assert file.read_text() == README
    file.write_text("no table")
    assert command.main(["table", str(file)]) == 2
    assert "`file` must have a table" in capsys.readouterr().err
    assert file.read_text() == "no table"


def test_the_pictures_of_the_readme_are_there():
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (Path(__file__).parent.parent / picture).is_file()
