import jax
import numpy as np
import optax
import pytest
from comparison_example import DATA, TEST, examples

from lazyjax.comparison import Comparison, compare, compare_ensemble, join
from lazyjax.models import Sinusoidal, from_linen, shallow_mlp


def networks(module, members, seed=1):
    keys = jax.random.split(jax.random.key(seed), members)
    return jax.vmap(lambda key: from_linen(module, key, DATA.x))(keys)


@pytest.fixture(scope="module")
def trained():
    return examples()


def test_shapes_have_the_members_on_axis_0(trained):
    times = len(trained.steps)
    assert trained.histories["network"].loss.shape == (2, 301)
    assert trained.histories["tangent model"].loss.shape == (2, 301)
    for model in ("network", "tangent", "closed"):
        assert trained.models[model].train.shape == (2, times, 8, 1)
        assert trained.models[model].test.shape == (2, times, 5, 1)
    assert trained.gap_train.shape == trained.gap_test.shape == (2, times)
    points = len(trained.kernel_steps)
    assert trained.kernels.shape == (2, points, 8, 8)
    assert trained.network.layer["hidden_0/kernel"].shape == (2, len(trained.curve_steps))
    for name, values in trained.arrays().items():
        shared = ("x", "y", "test_x", "steps", "curve_steps", "kernel_steps", "examples")
        shared += ("kernel_examples", "closed/steps", "structure")
        assert name in shared or values.shape[0] == 2, name


def test_the_closed_form_is_the_tangent_model(trained):
    change = np.abs(trained.tangent.train[:, -1] - trained.tangent.train[:, 0]).max()
    closed, tangent = trained.closed, trained.tangent
    for gap in (closed.train - tangent.train, closed.test - tangent.test):
        assert np.abs(gap).max() < 1e-10 * change
    np.testing.assert_array_equal(closed.steps, trained.steps)
    at = np.isin(trained.curve_steps, trained.steps)
    where = np.isin(trained.steps, trained.curve_steps)
    np.testing.assert_allclose(closed.movement[:, where], tangent.movement[:, at], atol=1e-12)
    np.testing.assert_allclose(closed.loss[:, where], tangent.loss[:, at], rtol=1e-9)


def test_at_the_start_network_and_tangent_model_are_one(trained):
    assert np.all(trained.share[:, 0] == 0)
    # the two are compiled apart, and JAX 0.10 rounds them apart
    ulp = np.finfo(float).eps * np.abs(trained.network.train[:, 0]).max()
    assert np.all(trained.gap_train[:, 0] <= ulp)
    assert np.all(trained.kernel_change[:, 0] == 0)
    np.testing.assert_allclose(trained.kernel_alignment[:, 0], 1, rtol=1e-12)
    assert np.all(trained.gap_train[:, -1] > 0)
    assert np.all(trained.kernel_change[:, -1] > 0)


@pytest.mark.thorough
def test_a_linear_model_has_no_gap_and_a_kernel_that_stays():
    f, params = networks(Sinusoidal(6), 2)
    optimizer = optax.sgd(0.05, 0.5)
    compared = compare_ensemble(f, params, DATA, optimizer, steps=300, test=TEST)
    assert compared.gap_test.max() < 1e-12
    assert compared.kernel_change.max() < 1e-14
    assert compared.closed.gap.max() < 1e-12


@pytest.mark.thorough
def test_the_gap_falls_with_alpha():
    f, params = from_linen(shallow_mlp(10, activation="tanh"), jax.random.key(1), DATA.x)
    compared = compare(f, params, DATA, optax.sgd(0.05), steps=200, test=TEST, alpha=(10.0, 1000.0))
    ratio = compared.gap_train[0, -1] / compared.gap_train[1, -1]
    assert ratio == pytest.approx(100, rel=0.1)
    assert compared.closed.gap.max() < 1e-10
    # losses and kernels are those of f, not of alpha f
    losses = np.mean(np.square(compared.network.train[:, -1] - compared.y), axis=(1, 2))
    np.testing.assert_allclose(compared.network.loss[:, -1], losses, rtol=1e-12)
    np.testing.assert_allclose(compared.kernels[0, 0], compared.kernels[1, 0], rtol=1e-12)


@pytest.mark.thorough
def test_an_anchor_elsewhere_expands_there():
    f, params = networks(shallow_mlp(10), 2)
    _, anchor = networks(shallow_mlp(10), 2, seed=3)
    compared = compare_ensemble(
        f, params, DATA, optax.sgd(0.02), steps=100, test=TEST, anchor=anchor
    )
    assert np.all(compared.gap_train[:, 0] > 1e-3)
    assert compared.closed.gap.max() < 1e-11


def test_numbers_and_joins_keep_the_members_apart(trained):
    both = join([trained, trained])
    assert both.network.loss.shape[0] == both.members == 4
    assert both.steps.shape == trained.steps.shape
    assert both.histories == {}
    assert both.numbers(0) == both.numbers(2) == trained.numbers(0)
    assert both.numbers(1) == both.numbers(3) == trained.numbers(1)
    assert trained.numbers(0) != trained.numbers(1)
    assert trained.numbers(1)["final loss of the network"] == trained.network.loss[1, -1]


def test_a_comparison_comes_back_from_its_arrays_and_from_its_members(trained):
    arrays = trained.arrays("case/")
    assert arrays["case/network/layer/hidden_0/kernel"].shape == (2, len(trained.curve_steps))
    back = Comparison.of(arrays | {"target": np.zeros(3), "case/other": np.zeros(2)}, "case/")
    parts = [trained.of_members(slice(i, i + 1)) for i in range(2)]
    assert [part.members for part in parts] == [1, 1]
    for other in (back, join(parts)):
        found = other.arrays("case/")
        assert list(found) == list(arrays)
        assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
