"""What people train: losses, targets, outputs and dtypes of every kind, each by its own numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lazyjax import compare, verdicts
from lazyjax.comparison import amounts as measured_amounts
from lazyjax.comparison import compare_ensemble, heavy_ball, running, sizes
from lazyjax.types import Dataset

X = np.random.default_rng(0).normal(size=(12, 2))
W = {"a": np.random.default_rng(1).normal(size=(2, 6))}
W["b"] = np.linspace(-1, 1, 12).reshape(6, 2)
VALUES = np.sin(X[:, :1] * 2)


def model(w, x):
    return jnp.tanh(x @ w["a"]) @ w["b"]


def one_output(w, x):
    return model(w, x)[:, :1]


def number(w, x):
    return model(w, x)[:, 0]


def gaussian(prediction, y):
    mean, log_scale = prediction[:, :1], prediction[:, 1:]
    return log_scale + 0.5 * jnp.square((y - mean) * jnp.exp(-log_scale))


def masked(prediction, y):
    return jnp.square(prediction - y["y"]) * y["mask"]


def quantiles(prediction, y):
    error = y - prediction
    levels = jnp.array([[0.1, 0.9]])
    return jnp.maximum(levels * error, (levels - 1) * error)


CASES = {
    "masked": (model, {"y": np.sin(X), "mask": 1.0 * (np.arange(12) != 3)[:, None]}, masked),
    "Gaussian likelihood": (model, VALUES, gaussian),
    "quantiles": (model, VALUES, quantiles),
    "Huber": (model, np.sin(X), optax.losses.huber_loss),
    "one number": (number, VALUES[:, 0], optax.losses.squared_error),
    "half the squares": (model, np.sin(X), optax.losses.l2_loss),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_values_are_compared_and_not_classified(name):
    f, y, loss = CASES[name]
    compared = compare(f, W, Dataset(X, y), optax.sgd(0.05), steps=20, loss=loss, test=X[:3])
    value = np.mean(loss(f(jax.tree.map(jnp.asarray, compared.histories["network"].final), X), y))
    assert compared.network.loss[0, -1] == pytest.approx(float(value), rel=1e-10)
    assert compared.disagreement_train is None
    assert (compared.closed is None) == (name not in ("one number", "half the squares"))
    if compared.closed is not None:
        assert compared.closed.gap.max() < 1e-12
        np.testing.assert_allclose(compared.closed.loss[0, -1], compared.tangent.loss[0, -1], 1e-9)
    assert np.isnan(compared.target_alignment).all() == (name == "masked")
    assert verdicts(compared)[0].word in ("lazy", "in between", "not lazy")
    compared.plot()


SIDE = np.where(X[:, :1] > 0, 1.0, 0.0)
BINARY = {
    "logits": (SIDE, optax.losses.sigmoid_binary_cross_entropy, 0.0),
    "signs": (2 * SIDE - 1, optax.losses.squared_error, 0.0),
    "hinge": (2 * SIDE - 1, optax.losses.hinge_loss, 0.0),
    "zeros and ones as values": (SIDE, optax.losses.squared_error, 0.5),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", BINARY)
def test_two_classes_are_the_sides_of_a_threshold(name):
    y, loss, threshold = BINARY[name]
    data = Dataset(X, y)
    compared = compare(one_output, W, data, optax.adam(0.05), steps=40, loss=loss, test=data)
    outputs = compared.network.train[0, -1]
    right = np.mean((outputs > threshold) == (np.asarray(y) > threshold))
    assert compared.network.train_accuracy[0, -1] == pytest.approx(right)
    assert compared.network.test_accuracy[0, -1] == pytest.approx(right)
    both = (outputs > threshold) != (compared.tangent.train[0, -1] > threshold)
    assert compared.disagreement_train[0, -1] == pytest.approx(np.mean(both))


@pytest.mark.thorough
def test_one_hot_rows_name_the_largest_output_under_any_loss():
    labels = jnp.arange(12) % 2
    for loss in (optax.losses.squared_error, optax.losses.softmax_cross_entropy):
        data = Dataset(X, jax.nn.one_hot(labels, 2))
        compared = compare(model, W, data, optax.sgd(0.1), steps=10, loss=loss)
        right = np.mean(compared.network.train[0, -1].argmax(-1) == labels)
        assert compared.network.train_accuracy[0, -1] == pytest.approx(right)


@pytest.mark.thorough
def test_half_precision_is_measured_in_single_and_its_rounding_is_no_gap():
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), W)
    x = X.astype(jnp.bfloat16)
    linear = lambda w, x: x @ w["a"]  # noqa: E731 (one line)
    w = {"a": half["a"]}
    data = Dataset(x, jnp.zeros((12, 6), jnp.bfloat16))
    with pytest.warns(UserWarning, match="rounding"):
        compared = compare(linear, w, data, optax.sgd(0.05), steps=10)
    assert compared.network.train.dtype == np.float32
    assert compared.epsilon == float(jnp.finfo(jnp.bfloat16).eps)
    verdict = verdicts(compared)[0]
    assert verdict.gap == 0
    assert any("rounding takes over" in warning for warning in verdict.warnings)


@pytest.mark.thorough
def test_products_predict_what_the_kernel_predicts(monkeypatch):
    data = Dataset(X, jnp.sin(X))
    optimizer = optax.sgd(0.1, 0.3)
    options = {"steps": 200, "test": X[:3] + 1}
    dense = compare(model, W, data, optimizer, **options)

    def without(*arguments, **settings):
        return measured_amounts(*arguments, **settings)._replace(dense=False, products=400)

    monkeypatch.setattr(running, "amounts", without)
    compared = compare(model, W, data, optimizer, **options)
    found, wanted = compared.closed, dense.closed
    assert len(found.steps) == 8
    at = np.searchsorted(wanted.steps, found.steps)
    size = np.abs(wanted.train - wanted.train[:, :1]).max()
    for name in ("train", "test", "loss", "movement"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(wanted, name)[:, at], atol=1e-6 * size
        )
    assert compared.critical_learning_rate == pytest.approx(dense.critical_learning_rate, rel=0.01)
    moved = compare(model, W, data, optimizer, anchor={"a": W["a"] + 0.1, "b": W["b"]}, **options)
    assert moved.closed.gap.max() < 1e-6 * size


@pytest.mark.thorough
def test_too_few_products_are_told(monkeypatch):
    def few(*arguments, **settings):
        return measured_amounts(*arguments, **settings)._replace(dense=False, products=3)

    monkeypatch.setattr(running, "amounts", few)
    compared = compare(model, W, Dataset(X, jnp.sin(X)), optax.sgd(0.1), steps=200)
    assert compared.closed is None
    assert "85 products with the kernel of 24 outputs cost more" in compared.no_closed_form
    with pytest.raises(ValueError, match="`closed` must be there, got None: 85 products"):
        _ = compared.closed_form


@pytest.mark.thorough
def test_samples_are_of_the_data_and_are_said(monkeypatch):
    monkeypatch.setattr(sizes, "FREE", 1e7)
    x = jax.random.normal(jax.random.key(2), (2000, 2))
    data = Dataset(x, jnp.sin(x))
    many = {"a": jnp.ones((2, 300)) / 9, "b": jnp.ones((300, 2)) / 300}
    compared = compare(model, many, data, optax.sgd(0.01), steps=2, memory="40MB")
    assert len(compared.kernel_examples) < 2000
    assert len(compared.examples) < 2000
    few = np.asarray(x)[compared.examples]
    np.testing.assert_allclose(
        compared.network.train[0, 0], model(many, few), rtol=1e-12, atol=1e-15
    )
    said = str(verdicts(compared)[0])
    assert f"kernels are those of {len(compared.kernel_examples)} examples" in said
    label = compared.plot()["kernels"].axes[0].get_xlabel()
    assert f"{len(compared.kernel_examples)} of 2,000" in label
    with pytest.raises(ValueError, match="`memory` must be at least"):
        compare(model, many, data, optax.sgd(0.01), steps=2, memory="1kB")


@pytest.mark.thorough
def test_members_are_those_that_train_alone():
    several = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), W)
    data = Dataset(X, jnp.arange(12) % 2)
    loss = optax.losses.softmax_cross_entropy_with_integer_labels
    both = compare_ensemble(model, several, data, optax.sgd(0.1), steps=20, loss=loss)
    alone = compare(
        model, jax.tree.map(lambda w: 2 * w, W), data, optax.sgd(0.1), steps=20, loss=loss
    )
    assert both.of_members(slice(1, 2)).numbers() == pytest.approx(alone.numbers(), rel=1e-8)
    assert both.histories["network"].loss.shape == (2, 21)


@pytest.mark.thorough
def test_one_hot_targets_may_be_whole_numbers():
    y = jax.nn.one_hot(jnp.arange(12) % 2, 2, dtype=int)
    loss = optax.losses.softmax_cross_entropy
    compared = compare(model, W, Dataset(X, y), optax.sgd(0.1), steps=10, loss=loss)
    right = np.mean(compared.network.train[0, -1].argmax(-1) == np.arange(12) % 2)
    assert compared.network.train_accuracy[0, -1] == pytest.approx(right)


def test_decay_of_matrices_alone_is_no_gradient_descent():
    def matrices(params):
        return jax.tree.map(lambda w: w.ndim > 1, params)

    decayed = optax.chain(optax.add_decayed_weights(0.5, mask=matrices), optax.sgd(0.05))
    assert heavy_ball(decayed, W, 30) is None
    assert heavy_ball(optax.chain(optax.clip(1e3), optax.sgd(0.05)), W, 5) is None
    assert heavy_ball(optax.sgd(0.05, 0.9), W | {"c": jnp.ones(())}, 10_000) is not None
