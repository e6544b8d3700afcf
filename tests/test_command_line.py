"""`python -m lazyjax`: a kernel, or a comparison, for people who only want the file."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import optax
import pytest

from lazyjax import Comparison, Dataset, compare, loop, ntk, pages, verdicts
from lazyjax.__main__ import main
from lazyjax.store import open_kernel, workers

MODELS = """
import jax.numpy as jnp
import numpy as np

def make():
    return lambda params, x: jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]), {
        "a": np.linspace(-1, 1, 20).reshape(2, 10), "b": np.linspace(1, 2, 30).reshape(10, 3)
    }

def wrong():
    return 3

def classifier():
    return lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"], {
        "a": np.linspace(-1, 1, 10).reshape(2, 5), "b": np.linspace(1, 2, 15).reshape(5, 3)
    }
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "models_of_the_test.py").write_text(MODELS)
    np.savez(tmp_path / "x.npz", x=np.linspace(0, 1, 26).reshape(13, 2))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)
    sys.modules.pop("models_of_the_test", None)


def run(*options, factory="models_of_the_test:make", data="x.npz", out="K.zarr"):
    return main(["kernel", factory, "--data", data, "--out", out, "--tile", "5", *options])


def wanted(x1, x2=None, **options):
    from models_of_the_test import make  # pyright: ignore (a module that the test writes)

    return np.asarray(ntk(*make(), x1, x2, **options))


def test_the_file_holds_the_kernel_and_one_line_says_so(folder, capsys):
    assert run("--memory", "100MiB") == 0
    assert capsys.readouterr().out.startswith("K.zarr: (13, 13, 3, 3) float64, 11.9KiB, ")
    with np.load("x.npz") as held:
        x = held["x"]
    np.testing.assert_allclose(open_kernel("K.zarr"), wanted(x), rtol=1e-12)


@pytest.mark.thorough
@pytest.mark.parametrize("names", [("x1", "x2"), ("x1",)])
def test_two_batches_or_one_under_another_name(folder, names):
    x = {name: np.linspace(-1, n, 2 * n + 6).reshape(-1, 2) for n, name in enumerate(names)}
    np.savez("x.npz", **x)
    assert run("--reduce", "trace") == 0
    np.testing.assert_allclose(
        open_kernel("K.zarr"), wanted(*x.values(), reduce="trace"), rtol=1e-12
    )


@pytest.mark.thorough
def test_a_file_of_one_array_is_mapped(folder):
    x = np.linspace(0, 1, 26).reshape(13, 2)
    np.save("x.npy", x)
    assert run("--reduce", "sum", data="x.npy") == 0
    np.testing.assert_allclose(open_kernel("K.zarr"), wanted(x, reduce="sum"), rtol=1e-12)


def test_what_was_interrupted_goes_on_with_resume_only(folder, capsys, monkeypatch):
    compute, calls = workers.compute_tile, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(*arguments)

    monkeypatch.setattr(workers, "compute_tile", interrupted)
    assert run() == 130
    assert capsys.readouterr().err == "Interrupted. The same command with --resume goes on.\n"
    assert run() == 2
    assert (
        "error: `--out` must be new, got K.zarr. Name another, or add --resume."
        in capsys.readouterr().err
    )
    assert run("--resume") == 0
    assert len(calls) == 3 + 4  # 6 tiles; the third was begun twice
    assert run("--resume", "--reduce", "trace") == 2
    assert "another `reduce`: none is recorded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factory": "no_such_module:make"}, "`MODULE:FACTORY` must name a function in a module"),
        ({"factory": "models_of_the_test:none"}, "`MODULE:FACTORY` must name a function"),
        ({"factory": "models_of_the_test"}, "`MODULE:FACTORY` must name a function"),
        (
            {"factory": "models_of_the_test:wrong"},
            "`MODULE:FACTORY` must give (f, params), got int",
        ),
        ({"data": "none.npz"}, "`--data` must be a file, got none.npz"),
        ({"data": "models_of_the_test.py"}, "`--data` must be an npz or npy file"),
        ({"data": "other.npz"}, "`--data` must hold x, or x1 and x2, got ['y']"),
        ({"out": "none/K.zarr"}, "`path` must be in a folder that exists"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(folder, capsys, options, message):
    np.savez("other.npz", y=np.ones(3))
    assert run(**options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_wrong_options_and_commands_are_refused(folder, capsys):
    for options in (["--memory", "much"], ["--reduce", "all"], ["--tile", "0"]):
        assert run(*options) == 2
        assert capsys.readouterr().err.startswith(f"error: `{options[0].strip('-')}` must be")
    assert main(["kernels"]) == 2
    assert "`command` must be one of compare, kernel, got 'kernels'" in capsys.readouterr().err
    assert main(["kernel", "--help"]) == 0
    assert main(["kernel"]) == 2
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert not Path("K.zarr").exists()


# --- compare


@pytest.fixture
def points(folder):
    x = np.linspace(-1, 1, 24).reshape(12, 2)
    np.savez("d.npz", x=x, y=np.arange(12) % 3, test_x=x + 1, test_y=np.arange(12) % 3)
    np.savez("values.npz", x=x, y=np.sin(3 * x[:, [0, 0, 1]]))
    return folder


def compared(*options, data="d.npz", out="page"):
    words = ["--data", data, "--out", out, "--steps", "40", *options]
    return main(["compare", "models_of_the_test:classifier", *words])


@pytest.mark.thorough
def test_the_page_and_the_numbers_are_in_the_folder_and_the_verdict_is_printed(
    points, capsys, monkeypatch
):
    monkeypatch.setattr(pages, "_png", lambda figure: b"")  # figures have tests of their own
    assert compared("--learning-rate", "0.2") == 0
    found = Comparison.load("page/comparison.npz")
    printed = capsys.readouterr().out
    assert printed == f"{verdicts(found)[0]}\npage/index.html\n"
    from models_of_the_test import classifier  # pyright: ignore (a module that the test writes)

    with np.load("d.npz") as held:
        data = Dataset(held["x"], held["y"])
    loss = optax.losses.softmax_cross_entropy_with_integer_labels
    own = compare(*classifier(), data, optax.sgd(0.2), steps=40, loss=loss)
    np.testing.assert_array_equal(found.network.loss, own.network.loss)
    np.testing.assert_array_equal(found.tangent.train, own.tangent.train)
    assert found.network.test_accuracy is not None
    assert "python -m lazyjax" in Path("page/index.html").read_text()
    assert compared() == 2
    assert "error: `--out` must be new, got page" in capsys.readouterr().err


@pytest.mark.thorough
def test_a_rate_that_is_auto_is_half_of_the_critical_one(points, capsys):
    assert compared("--momentum", "0.5", data="values.npz") == 0
    found = Comparison.load("page/comparison.npz")
    half = found.critical_learning_rate[0] / 2
    assert found.learning_rate[0] == pytest.approx(half, rel=1e-6)
    assert found.momentum[0] == pytest.approx(0.5)
    assert found.closed is not None


@pytest.mark.thorough
def test_alphas_are_members(points, capsys):
    assert compared("--alpha", "1", "100", "--learning-rate", "0.01", data="values.npz") == 0
    assert Comparison.load("page/comparison.npz").alpha.tolist() == [1, 100]
    assert "alpha = 100: " in capsys.readouterr().out


@pytest.mark.thorough
def test_a_training_that_was_interrupted_goes_on(points, monkeypatch, capsys):
    run, calls = loop.run_chunk, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:  # each training is traced and then run
            raise KeyboardInterrupt
        return run(*arguments)

    options = ("--learning-rate", "0.2")
    monkeypatch.setattr(loop, "run_chunk", interrupted)
    assert compared(*options) == 130
    assert capsys.readouterr().err.endswith("The same command with --resume goes on.\n")
    assert {p.name for p in Path("page").iterdir()} == {"network.npz"}
    assert compared(*options, "--resume") == 0
    assert len(calls) == 4 + 3  # the network was not trained again
    whole = Path("page/comparison.npz").read_bytes()
    assert compared(*options, out="again") == 0
    assert Path("again/comparison.npz").read_bytes() == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "`--steps` must be at least 1"),
        (["--optimizer", "sdg"], "`--optimizer` must be one of sgd, adam"),
        (["--loss", "mse"], "`--loss` must be one of squared_error"),
        (["--learning-rate", "fast"], "`--learning-rate` must be a number or auto"),
        (["--learning-rate", "-1"], "`--learning-rate` must be positive"),
        (["--optimizer", "adam"], "`--learning-rate` must be a number for adam"),
        (
            ["--optimizer", "adam", "--learning-rate", "0.1", "--momentum", "0.9"],
            "`--momentum` must be 0 for adam",
        ),
        (["--momentum", "1.5"], "`momentum` must be in [0, 1)"),
        (["--batch-size", "0"], "`batch_size` must be at least 1"),
        (["--alpha", "0"], "`alpha` must be positive"),
        (["--memory", "much"], "`memory` must be an amount"),
        (["--loss", "squared_error"], "`data.y`"),
    ],
)
def test_what_is_wrong_with_a_comparison_is_told_in_one_line(points, capsys, options, message):
    assert compared(*options) == 2
    assert capsys.readouterr().err.strip().startswith(f"error: {message}")


def test_a_file_without_targets_is_refused(points, capsys):
    for name, arrays in (("a", {"x": 1}), ("b", {"x": 1, "y": 2, "z": 3}), ("c", {"test_y": 1})):
        np.savez(f"{name}.npz", **{key: np.ones((2, 2)) for key in arrays})
        assert compared(data=f"{name}.npz") == 2
        assert "error: `--data` must hold x and y" in capsys.readouterr().err
    np.save("one.npy", np.ones((2, 2)))
    assert compared(data="one.npy") == 2
    assert "got one array" in capsys.readouterr().err
    assert not Path("page").exists()


def test_it_runs_as_a_module(folder):
    command = [sys.executable, "-m", "lazyjax", "kernel", "models_of_the_test:make"]
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [*command, "--data", "x.npz", "--out", "K.zarr"],
        env={"PATH": "", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.startswith("K.zarr: (13, 13, 3, 3) float32, ")
    assert done.stderr == ""
