import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.comparison import compare, ensemble, member_summary, spread, summarise
from lazyjax.comparison import Comparison, join
from lazyjax.data import make_dataset
from lazyjax.models import Sinusoidal, shallow_mlp
from lazyjax.tangent import center, scale

GRID = jnp.linspace(-1, 1, 21)[:, None]
DATA = make_dataset(jax.random.key(0), n=8)


def networks(module, members, seed=1):
    return ensemble(module, jax.random.key(seed), DATA.x, members)


@pytest.fixture(scope="module")
def trained():
    f, start = networks(shallow_mlp(30), 2)
    return compare(f, start, DATA, learning_rate=0.02, steps=400, grid_x=GRID)


def test_shapes_have_the_members_on_axis_0(trained):
    compared, history = trained
    times = len(compared.steps)
    assert history.loss.shape == (2, 401)
    for model in ("network", "tangent", "closed"):
        assert compared.models[model].train.shape == (2, times, 8, 1)
        assert compared.models[model].grid.shape == (2, times, 21, 1)
    assert compared.gap_train.shape == compared.gap_grid.shape == (2, times)
    points = len(compared.kernel_steps)
    assert compared.kernels.shape == (2, points, 8, 8)
    assert compared.network.layer["hidden_0/kernel"].shape == (2, len(compared.curve_steps))
    assert np.all(np.diff(compared.x[:, 0]) > 0)


def test_the_closed_form_is_the_tangent_model(trained):
    compared, _ = trained
    change = np.abs(compared.tangent.train[:, -1] - compared.tangent.train[:, 0]).max()
    closed, tangent = compared.closed, compared.tangent
    for gap in (closed.train - tangent.train, closed.grid - tangent.grid):
        assert np.abs(gap).max() < 1e-10 * change
    at = np.isin(compared.curve_steps, compared.steps)
    where = np.isin(compared.steps, compared.curve_steps)
    np.testing.assert_allclose(
        compared.closed.movement[:, where], compared.tangent.movement[:, at], atol=1e-12
    )
    np.testing.assert_allclose(
        compared.closed.loss[:, where], compared.tangent.loss[:, at], rtol=1e-9
    )


def test_at_the_start_network_and_tangent_model_are_one(trained):
    compared, _ = trained
    assert np.all(compared.gap_train[:, 0] == 0)
    assert np.all(compared.kernel_change[:, 0] == 0)
    np.testing.assert_allclose(compared.kernel_alignment[:, 0], 1, rtol=1e-12)
    assert np.all(compared.gap_train[:, -1] > 0)
    assert np.all(compared.kernel_change[:, -1] > 0)


def test_a_linear_model_has_no_gap_and_a_kernel_that_stays():
    f, start = networks(Sinusoidal(6), 2)
    compared, _ = compare(f, start, DATA, learning_rate=0.05, steps=300, grid_x=GRID, momentum=0.5)
    assert compared.gap_grid.max() < 1e-12
    assert compared.kernel_change.max() < 1e-14
    assert compared.closed.gap.max() < 1e-12


def test_the_gap_falls_with_alpha():
    f, start = networks(shallow_mlp(10, activation="tanh"), 1)
    start = jax.tree.map(lambda w: jnp.repeat(w, 2, axis=0), start)
    alphas = jnp.array([10.0, 1000.0])
    models = jax.vmap(lambda w, a: scale(center(f, w), a))(start, alphas)
    compared, _ = compare(
        models, start, DATA, learning_rate=0.05, steps=200, grid_x=GRID, alphas=alphas
    )
    ratio = compared.gap_train[0, -1] / compared.gap_train[1, -1]
    assert ratio == pytest.approx(100, rel=0.1)
    assert compared.closed.gap.max() < 1e-10


def test_an_anchor_elsewhere_expands_there():
    f, start = networks(shallow_mlp(10), 2)
    _, anchor = networks(shallow_mlp(10), 2, seed=3)
    compared, _ = compare(f, start, DATA, learning_rate=0.02, steps=100, grid_x=GRID, anchor=anchor)
    assert np.all(compared.gap_train[:, 0] > 1e-3)
    assert compared.closed.gap.max() < 1e-11


def test_summaries_and_joins_keep_the_members_apart(trained):
    compared, _ = trained
    both = join([compared, compared])
    assert both.network.loss.shape[0] == 4
    assert both.steps.shape == compared.steps.shape
    numbers = summarise(both, ["a", "b", "c", "d"])
    assert numbers["a"] == numbers["c"] == member_summary(compared, 0)
    spreads = spread(compared)["relative kernel change"]
    assert spreads["least"] <= spreads["median"] <= spreads["most"]


def test_a_comparison_comes_back_from_its_arrays_and_from_its_members(trained):
    compared, _ = trained
    arrays = compared.arrays("case/")
    assert arrays["case/network_layer/hidden_0/kernel"].shape == (2, len(compared.curve_steps))
    back = Comparison.of(arrays | {"target": np.zeros(3)}, "case/")
    parts = [compared.of_members(slice(i, i + 1)) for i in range(2)]
    assert [part.members for part in parts] == [1, 1]
    for other in (back, join(parts)):
        found = other.arrays("case/")
        assert list(found) == list(arrays)
        assert all(np.array_equal(found[name], arrays[name]) for name in arrays)


def test_losses_and_kernels_are_scaled_member_by_member(trained):
    compared, _ = trained
    scaled = compared.scaled(np.array([1.0, 4.0]))
    for name, own in scaled.models.items():
        before = compared.models[name]
        np.testing.assert_allclose(own.loss, before.loss * [[1], [4]], rtol=1e-15)
        assert own.train is before.train
    np.testing.assert_allclose(scaled.kernels[1], compared.kernels[1] / 4, rtol=1e-15)
