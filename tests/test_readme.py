"""What the README says is run, and what it shows is there."""

import re
from pathlib import Path

import jax
import numpy as np

from experiments import runner

README = (Path(__file__).parent.parent / "README.md").read_text()


def run(number):
    code = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[number]
    names = {}
    with jax.numpy_rank_promotion("allow"):  # Flax layers promote their biases
        exec(code, names)
    return names


def test_the_own_model_of_the_readme_runs_and_says_how_lazy_it_was(capsys):
    names = run(0)
    printed = capsys.readouterr().out
    assert re.search(r"loss \d\S+ \(tangent model \d\S+\)", printed)
    assert re.search(r"weights moved by \S+%, kernel by \S+%, gap \S+", printed)
    assert names["network"].loss[-1] < names["network"].loss[0]
    assert np.isfinite(names["gap"])


def test_the_kernel_of_the_readme_is_there_and_its_budget_changes_nothing(capsys):
    names = run(1)
    assert names["kernel"].shape == (8, 8, 10, 10)
    mean = np.einsum("nmkk->nm", names["kernel"]) / 10
    np.testing.assert_allclose(names["traced"], mean, rtol=1e-4, atol=1e-4 * mean.max())
    assert "784 positions" in capsys.readouterr().out


def test_the_readme_names_every_experiment_and_no_other():
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", README, flags=re.MULTILINE)
    table = runner.discover()
    assert [name for name, _ in rows] == list(table)
    for name, question in rows:
        assert question == runner.question(table[name])


def test_the_pictures_of_the_readme_are_there():
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (Path(__file__).parent.parent / picture).is_file()
