"""The pages: their blocks that need only lazyjax run, and agree."""

import ast
import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

DOCS = Path(__file__).parent.parent / "docs"


def run(page):
    found = {}
    for code in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL):
        exec(code, found)
    return found


def test_pages_name_what_is_there():
    """Their blocks that need other libraries run nowhere: what they import of lazyjax is there."""
    for page in DOCS.rglob("*.md"):
        for code in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("lazyjax."):
                    module = importlib.import_module(node.module)
                    for name in node.names:
                        assert hasattr(module, name.name), (page.name, name.name)
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text()):
            assert (page.parent / picture).is_file(), (page.name, picture)


@pytest.mark.thorough
def test_the_page_on_compare_prints_what_it_shows(capsys):
    jax.config.update("jax_enable_x64", False)  # as its reader has it
    try:
        with jax.numpy_rank_promotion("allow"):  # Flax layers promote their biases
            found = run("compare.md")
    finally:
        jax.config.update("jax_enable_x64", True)
    text = (DOCS / "compare.md").read_text()
    shown = re.search(r"It prints\n\n((?:    .*\n)+)", text)
    assert shown is not None
    printed = capsys.readouterr().out
    assert printed.startswith(re.sub("^    ", "", shown[1], flags=re.MULTILINE))
    assert re.search(r"^alpha = 100: lazy, gap", printed, re.MULTILINE)
    assert [ax.get_title() for ax in found["figure"].axes][2] == "accuracy"
    assert set(found["figures"]) >= {"predictions", "training", "measures"}
    named = set(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE))
    for name in re.findall(r"`(\w+)`", " ".join(named)):
        assert hasattr(found["compared"], name), name


@pytest.fixture(scope="module")
def names():
    return run("neural_tangents.md")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("large"))
        found = run("large_kernels.md")
        found["whole"] = np.asarray(found["stored"])
    return found


@pytest.mark.thorough
def test_the_ways_to_a_large_kernel_agree(large):
    from lazyjax import matrix, ntk

    kernel = ntk(large["f"], large["params"], large["x"])
    square = np.asarray(matrix(kernel))
    np.testing.assert_allclose(large["whole"], np.einsum("nmkk->nm", kernel) / 3, atol=1e-12)
    np.testing.assert_array_equal(large["corner"], large["whole"][:3, :5])
    values = np.linalg.eigvalsh(square)
    np.testing.assert_allclose(large["top"].values, values[:-6:-1], rtol=1e-10)
    dense = square + np.asarray(large["ridge"]) * np.eye(150)
    solved = np.linalg.solve(dense, np.asarray(large["y"]).reshape(-1))
    np.testing.assert_allclose(large["found"].x, solved, atol=1e-6 * np.abs(solved).max())
    exact = np.sum(np.log1p(values / large["ridge"]))
    volume = large["volume"]
    assert volume.lower - 4 * volume.error < exact < volume.upper + 4 * volume.error
    assert large["start"].fit.shape == (2, 50, 3)
    error = np.linalg.norm(large["approximate"] - kernel) / np.linalg.norm(kernel)
    assert error < 2 * large["z"].error


@pytest.mark.thorough
def test_the_trained_tangent_model_predicts_by_its_parameters(large):
    from lazyjax import ntk

    x_test = jnp.ones((4, 8))
    cross = ntk(large["f"], large["params"], x_test, large["x"])
    moved = jnp.einsum("nmkl,ml->nk", cross, large["end"].coefficients)
    wanted = large["f"](large["params"], x_test) + moved
    np.testing.assert_allclose(large["prediction"], wanted, atol=1e-10)


@pytest.mark.thorough
def test_a_product_with_the_kernel_is_a_vjp_and_a_jvp(names):
    product = jnp.einsum("nmkl,ml->nk", names["kernel_test"], names["y_train"])
    np.testing.assert_allclose(names["product"], product, atol=1e-12)


@pytest.mark.thorough
def test_the_kernel_in_blocks_of_rows_is_the_kernel(names):
    np.testing.assert_allclose(names["in_blocks"], names["kernel"], atol=1e-12)


@pytest.mark.thorough
def test_a_batch_as_one_example_sees_all_of_the_batch(names):
    own = np.einsum("nmkk->nm", names["coupled"])
    assert names["coupled"].shape == (8, 8, 3, 3)
    # each column of the outputs is a unit vector, so its derivative is orthogonal to it
    outputs = names["normed"](names["params0"], names["x_train"])
    moved = np.einsum("nk,nmkl->mkl", outputs, names["coupled"])
    assert np.max(np.abs(moved)) < 1e-12 * np.max(np.abs(own))


@pytest.mark.thorough
def test_less_reduced_kernels_reduce_to_the_others(names):
    full, rest = names["full"], names["rest"]
    np.testing.assert_allclose(rest, np.einsum("nmhcgc->nmhg", full) / 2, atol=1e-12)
    np.testing.assert_allclose(names["both"], np.einsum("nmhh->nmh", rest), atol=1e-12)


@pytest.mark.thorough
def test_the_times_are_those_of_half_the_mean_squared_error(names):
    from lazyjax import matrix

    kernel, y, start = names["kernel"], names["y_train"], names["start"]
    values, vectors = np.linalg.eigh(matrix(kernel))
    for t, found in zip(names["times"], names["train_t"], strict=True):
        decay = np.exp(-0.2 * t * values / y.size)  # df/dt = -(eta / (N K)) Theta (f - y)
        residual = vectors @ (decay * (vectors.T @ (start - y).reshape(-1)))
        np.testing.assert_allclose(found, y + residual.reshape(y.shape), atol=1e-10)


@pytest.mark.thorough
def test_the_posterior_mean_is_the_limit_with_a_ridge(names):
    solved = jnp.linalg.solve(names["noisy"], names["y_train"])
    np.testing.assert_allclose(names["mean"], names["nngp_test"] @ solved, atol=1e-10)
    assert np.linalg.eigvalsh(names["covariance"]).min() > -1e-12


@pytest.mark.thorough
def test_the_ensemble_moves_by_the_flow_of_its_mean_kernel(names):
    from lazyjax import gradient_flow

    y = names["y_train"]
    flow = gradient_flow(names["traced"], y, jnp.zeros_like(y))
    mean = flow.test(0.2 * 50.0 / 2, names["traced_test"], jnp.zeros((5, 3)))
    np.testing.assert_allclose(names["ensemble_mean"], mean, atol=1e-10)
    assert np.linalg.eigvalsh(names["ensemble_covariance"]).min() > -1e-12


@pytest.mark.thorough
def test_the_limit_is_trained_by_its_own_kernels(names):
    from lazyjax import gradient_flow

    y = names["y_train"]
    flow = gradient_flow(names["of_limit"].ntk, y, jnp.zeros_like(y))
    mean = flow.test(names["t"], names["cross_limit"].ntk, jnp.zeros((5, 3)))
    np.testing.assert_allclose(names["trained"].mean, mean, atol=1e-10)
    noisy = names["of_limit"].nngp + 0.5 * jnp.eye(8)
    solved = jnp.linalg.solve(noisy, names["cross_limit"].nngp.T)
    covariance = names["test_limit"].nngp - names["cross_limit"].nngp @ solved
    np.testing.assert_allclose(names["bayes"].covariance, covariance, atol=1e-10)


@pytest.mark.thorough
def test_the_other_loss_is_trained(names):
    history = names["history"]
    assert history.diverged_at is None
    assert history.loss[-1] < history.loss[0]
    assert names["logits"].shape == (5, 3)


@pytest.mark.thorough
def test_the_page_on_every_step_trains_and_weighs():
    with jax.numpy_rank_promotion("allow"):  # Flax layers promote their biases
        found = run("every_step.md")
    assert found["losses"].shape == (30,)
    assert found["losses"][-1] < 0.01 * found["losses"][0]
    assert found["cross"].shape == (24, 40)
    weights = found["weights"]
    np.testing.assert_allclose(jnp.sum(1 / weights), 1, rtol=1e-6)
    assert not np.allclose(found["of_signs"][:, :, 0, 0], found["of_signs"][:, :, 0, 0].T)
    kernel = np.asarray(found["of_adam"])[:, :, 0, 0]
    np.testing.assert_array_equal(kernel, kernel.T)
    assert len(set(np.asarray(found["chosen"]).tolist())) == 8


@pytest.mark.thorough
def test_the_page_on_infinite_width_prints_what_it_shows(capsys):
    jax.config.update("jax_enable_x64", False)  # as its reader has it
    try:
        with jax.numpy_rank_promotion("allow"):  # its model adds a bias as one writes it
            found = run("infinite_width.md")
    finally:
        jax.config.update("jax_enable_x64", True)
    text = (DOCS / "infinite_width.md").read_text()
    shown = re.findall(r"It prints\n\n((?:    .*\n)+)", text)
    assert capsys.readouterr().out == "".join(re.sub("^    ", "", s, flags=re.M) for s in shown)
    limit = np.asarray(found["kernels"].ntk)
    assert np.linalg.norm(found["finite"] - limit) < 0.1 * np.linalg.norm(limit)
    assert np.linalg.eigvalsh(found["standard"].ntk).min() > 0
    assert "used twice" in found["refusal"]
    early, cross = found["early"], np.asarray(found["cross"].nngp)
    np.testing.assert_allclose(early.covariance[0], found["own"].nngp, atol=1e-6)
    noisy = np.asarray(found["kernels"].nngp) + 0.01 * np.eye(3)
    wanted = cross @ np.linalg.solve(noisy, np.asarray(found["y"]))
    np.testing.assert_allclose(found["posterior"].mean, wanted, rtol=1e-4)
