import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.comparison import compare, ensemble, join, member_summary, spread, summarise
from lazyjax.data import make_dataset
from lazyjax.models import Sinusoidal, shallow_mlp
from lazyjax.tangent import center, scale

GRID = jnp.linspace(-1, 1, 21)[:, None]
DATA = make_dataset(jax.random.key(0), n=8)


def networks(module, members, seed=1):
    return ensemble(module, jax.random.key(seed), DATA.x, members)


@pytest.fixture(scope="module")
def compared():
    f, start = networks(shallow_mlp(30), 2)
    return compare(f, start, DATA, learning_rate=0.02, steps=400, grid_x=GRID)


def test_shapes_have_the_members_on_axis_0(compared):
    arrays, history = compared
    times = len(arrays["steps"])
    assert history.loss.shape == (2, 401)
    for model in ("network", "tangent", "closed"):
        assert arrays[f"{model}_train"].shape == (2, times, 8, 1)
        assert arrays[f"{model}_grid"].shape == (2, times, 21, 1)
    assert arrays["gap_train"].shape == arrays["gap_grid"].shape == (2, times)
    points = len(arrays["kernel_steps"])
    assert arrays["kernels"].shape == (2, points, 8, 8)
    assert arrays["network_layer/hidden_0/kernel"].shape == (2, len(arrays["curve_steps"]))
    assert np.all(np.diff(arrays["x"][:, 0]) > 0)


def test_the_closed_form_is_the_tangent_model(compared):
    arrays, _ = compared
    change = np.abs(arrays["tangent_train"][:, -1] - arrays["tangent_train"][:, 0]).max()
    for name in ("train", "grid"):
        gap = np.abs(arrays[f"closed_{name}"] - arrays[f"tangent_{name}"]).max()
        assert gap < 1e-10 * change
    at = np.isin(arrays["curve_steps"], arrays["steps"])
    where = np.isin(arrays["steps"], arrays["curve_steps"])
    np.testing.assert_allclose(
        arrays["closed_movement"][:, where], arrays["tangent_movement"][:, at], atol=1e-12
    )
    np.testing.assert_allclose(
        arrays["closed_loss"][:, where], arrays["tangent_loss"][:, at], rtol=1e-9
    )


def test_at_the_start_network_and_tangent_model_are_one(compared):
    arrays, _ = compared
    assert np.all(arrays["gap_train"][:, 0] == 0)
    assert np.all(arrays["kernel_change"][:, 0] == 0)
    np.testing.assert_allclose(arrays["kernel_alignment"][:, 0], 1, rtol=1e-12)
    assert np.all(arrays["gap_train"][:, -1] > 0)
    assert np.all(arrays["kernel_change"][:, -1] > 0)


def test_a_linear_model_has_no_gap_and_a_kernel_that_stays():
    f, start = networks(Sinusoidal(6), 2)
    arrays, _ = compare(f, start, DATA, learning_rate=0.05, steps=300, grid_x=GRID, momentum=0.5)
    assert arrays["gap_grid"].max() < 1e-12
    assert arrays["kernel_change"].max() < 1e-14
    assert arrays["closed_gap"].max() < 1e-12


def test_the_gap_falls_with_alpha():
    f, start = networks(shallow_mlp(10, activation="tanh"), 1)
    start = jax.tree.map(lambda w: jnp.repeat(w, 2, axis=0), start)
    alphas = jnp.array([10.0, 1000.0])
    models = jax.vmap(lambda w, a: scale(center(f, w), a))(start, alphas)
    arrays, _ = compare(
        models, start, DATA, learning_rate=0.05, steps=200, grid_x=GRID, alphas=alphas
    )
    ratio = arrays["gap_train"][0, -1] / arrays["gap_train"][1, -1]
    assert ratio == pytest.approx(100, rel=0.1)
    assert arrays["closed_gap"].max() < 1e-10


def test_an_anchor_elsewhere_expands_there():
    f, start = networks(shallow_mlp(10), 2)
    _, anchor = networks(shallow_mlp(10), 2, seed=3)
    arrays, _ = compare(f, start, DATA, learning_rate=0.02, steps=100, grid_x=GRID, anchor=anchor)
    assert np.all(arrays["gap_train"][:, 0] > 1e-3)
    assert arrays["closed_gap"].max() < 1e-11


def test_summaries_and_joins_keep_the_members_apart(compared):
    arrays, _ = compared
    both = join([arrays, arrays])
    assert both["network_loss"].shape[0] == 4
    assert both["steps"].shape == arrays["steps"].shape
    numbers = summarise(both, ["a", "b", "c", "d"])
    assert numbers["a"] == numbers["c"] == member_summary(arrays, 0)
    spreads = spread(arrays)["relative kernel change"]
    assert spreads["least"] <= spreads["median"] <= spreads["most"]
