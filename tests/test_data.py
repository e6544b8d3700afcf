import jax
import jax.numpy as jnp
import numpy as np
import pytest
from thoroughness import few

from lazyjax.data import (
    TARGETS,
    batch_indices,
    check_dataset,
    excess_risk,
    expected_test_error,
    make_dataset,
)
from lazyjax.types import Dataset

BY_HAND = {
    "simple": lambda x: max(0.3 * x, 0.0),
    "middle": lambda x: abs(x + 0.5) - 2 * max(x - 0.5, 0.0) - 0.4,
    "complex": lambda x: np.sin(10 * x) * np.cos(2 * x + 1),
}


@pytest.mark.parametrize("name", TARGETS)
def test_the_targets_are_those_of_the_practical(name):
    x = np.linspace(-1, 1, 41)
    expected = [BY_HAND[name](v) for v in x]
    np.testing.assert_allclose(TARGETS[name](jnp.asarray(x)), expected, atol=1e-15)


@few("name", ["middle", "simple", "complex"])
def test_a_dataset_is_uniform_points_on_the_target(name):
    data = make_dataset(jax.random.key(0), n=2000, low=-2.0, high=3.0, target=name)
    assert data.x.shape == data.y.shape == (2000, 1)
    assert data.x.min() >= -2
    assert data.x.max() < 3
    quartiles = np.percentile(data.x, [25, 50, 75])
    np.testing.assert_allclose(quartiles, [-0.75, 0.5, 1.75], atol=0.15)
    np.testing.assert_array_equal(data.y, TARGETS[name](data.x))


def test_noise_has_its_standard_deviation_and_leaves_x_alone():
    clean = make_dataset(jax.random.key(1), n=4000)
    noisy = make_dataset(jax.random.key(1), n=4000, noise=0.3)
    np.testing.assert_array_equal(clean.x, noisy.x)
    assert jnp.std(noisy.y - clean.y) == pytest.approx(0.3, rel=0.05)


@few(("n", "batch_size"), [(7, 3), (12, 4), (12, 5), (10, 9), (5, 1)], 2)
def test_every_example_is_visited_once_per_epoch(n, batch_size):
    stream = np.asarray(
        batch_indices(jax.random.key(0), 0, n=n, batch_size=batch_size, steps=5 * n)
    ).reshape(-1)
    epochs = stream[: len(stream) // n * n].reshape(-1, n)
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    assert len({tuple(epoch) for epoch in epochs}) > 1


@few(("n", "batch_size"), [(7, 3), (12, 4), (12, 5)])
def test_the_batch_of_a_step_does_not_depend_on_how_the_run_is_cut(n, batch_size):
    key = jax.random.key(3)
    whole = batch_indices(key, 0, n=n, batch_size=batch_size, steps=60)
    cut = jax.jit(lambda start: batch_indices(key, start, n=n, batch_size=batch_size, steps=10))
    for start in range(0, 60, 10):
        np.testing.assert_array_equal(cut(start), whole[start : start + 10])


@pytest.mark.thorough
@pytest.mark.parametrize("start", [2**31 - 20, 0, 12345, 10**9])
def test_late_steps_do_not_overflow(start):
    n, batch_size = 100_003, 4099
    rows = batch_indices(jax.random.key(0), start, n=n, batch_size=batch_size, steps=2)
    epoch, position = divmod(start * batch_size, n)
    orders = [
        jax.random.permutation(jax.random.fold_in(jax.random.key(0), e), n)
        for e in (epoch, epoch + 1)
    ]
    expected = jnp.concatenate(orders)[position : position + 2 * batch_size]
    np.testing.assert_array_equal(rows.reshape(-1), expected)


@pytest.mark.parametrize("batch_size", [9, 30])
def test_a_batch_size_of_n_or_more_is_the_full_batch_and_needs_no_key(batch_size):
    rows = batch_indices(None, 7, n=9, batch_size=batch_size, steps=3)
    np.testing.assert_array_equal(rows, np.tile(np.arange(9), (3, 1)))


def test_the_excess_risk_of_a_constant_is_the_integral():
    risk = excess_risk(lambda w, x: w * x**0, jnp.asarray(0.5), target=lambda x: x**2)
    assert risk == pytest.approx(0.25 - 1 / 3 + 1 / 5, rel=1e-14)  # mean of (1/2 - x^2)^2


def test_the_excess_risk_of_the_target_is_zero_and_of_zero_its_mean_square():
    assert excess_risk(lambda w, x: TARGETS["middle"](x), None, target="middle") == 0
    risk = excess_risk(lambda w, x: 0 * x, None, target="middle")
    fine = np.linspace(-1, 1, 400_001)
    reference = np.mean([BY_HAND["middle"](v) ** 2 for v in fine])
    assert risk == pytest.approx(reference, rel=1e-4)


def test_the_error_of_the_quadrature_at_a_kink_falls_with_the_panels():
    def kink(x):
        return jnp.sqrt(jnp.maximum(x - 0.3001, 0.0))  # squared: a kink

    exact = (1 - 0.3001) ** 2 / 4
    errors = [
        abs(float(excess_risk(lambda w, x: 0 * x, None, target=kink, panels=p)) - exact)
        for p in (10, 500)
    ]
    assert errors[1] < 1e-6
    assert errors[1] < errors[0] / 100


def test_the_test_error_is_the_excess_risk_plus_the_noise_squared():
    f, params = (lambda w, x: w * x), jnp.asarray(0.4)
    risk = excess_risk(f, params, target="complex")
    assert expected_test_error(f, params, target="complex", noise=0.3) == pytest.approx(risk + 0.09)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_the_risk_of_a_half_precision_model_is_summed_in_float32(dtype):
    half = lambda w, x: jnp.full(x.shape, 0.25, dtype)  # noqa: E731 (a function of one line)
    exact = excess_risk(lambda w, x: jnp.full(x.shape, 0.25), None, target="middle")
    risk = excess_risk(half, None, target="middle")
    assert risk.dtype in (jnp.float32, jnp.float64)
    assert risk == pytest.approx(float(exact), rel=1e-6)


BAD = {
    "no examples": ({"n": 0}, ValueError, "`n` must be at least 1, got 0"),
    "half an example": ({"n": 1.5}, TypeError, "`n` must be a whole number, got 1.5"),
    "an empty interval": ({"low": 1.0, "high": 1.0}, ValueError, "`low` must be below `high`"),
    "an interval upside down": ({"low": 2.0}, ValueError, "`low` must be below `high`.*got 2.0"),
    "an endless interval": ({"high": np.inf}, ValueError, "both finite"),
    "negative noise": ({"noise": -0.1}, ValueError, "`noise` must be 0 or more.*got -0.1"),
    "noise of NaN": ({"noise": np.nan}, ValueError, "`noise` must be 0 or more"),
    "a misspelt target": ({"target": "midle"}, ValueError, "got 'midle'. Did you mean middle"),
    "a strange target": ({"target": "xyz"}, ValueError, "must be one of simple, middle, complex"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_of_a_dataset_are_refused(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make_dataset(jax.random.key(0), **({"n": 5} | change))


def test_bad_settings_of_batches_and_risks_are_refused():
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        batch_indices(jax.random.key(0), 0, n=5, batch_size=0, steps=1)
    with pytest.raises(ValueError, match="`key` must be given for mini-batches of 2 of 5"):
        batch_indices(None, 0, n=5, batch_size=2, steps=1)
    with pytest.raises(ValueError, match="`panels` must be at least 1, got 0"):
        excess_risk(lambda w, x: x, None, target="simple", panels=0)
    with pytest.raises(ValueError, match=r"`f` must give shape \(2000, 1\).*one output"):
        excess_risk(lambda w, x: x[:, 0], None, target="simple")
    with pytest.raises(ValueError, match="Did you mean simple"):
        excess_risk(lambda w, x: x, None, target="simpel")
    with pytest.raises(ValueError, match="`noise` must be 0 or more"):
        expected_test_error(lambda w, x: x, None, target="simple", noise=-1.0)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((3, 1)), np.zeros((2, 1)), "`data.y` must have one target for each of the 3"),
        (np.zeros((0, 1)), np.zeros((0, 1)), "`data.x` must hold at least one example"),
        (np.zeros(()), np.zeros((2, 1)), "`data.x` must have the batch on axis 0"),
        (np.array([[np.nan], [0.0]]), np.zeros((2, 1)), "`data.x` must be finite, got 1 values"),
        (np.zeros((2, 1)), np.array([[np.inf], [0.0]]), "`data.y` must be finite, got 1 values"),
    ],
)
def test_bad_datasets_are_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        check_dataset(Dataset(x, y))


def test_integer_tokens_and_labels_are_a_dataset():
    check_dataset(Dataset(np.zeros((3, 4), int), np.arange(3)))
