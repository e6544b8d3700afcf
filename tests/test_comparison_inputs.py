"""What `compare` is given wrongly is refused before any work, by name, rule and cure."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lazyjax import compare, train
from lazyjax.comparison import compare_ensemble
from lazyjax.curvature import sharpness
from lazyjax.patterns import relu_inputs
from lazyjax.types import Dataset

X = np.linspace(-1, 1, 8)[:, None]
DATA = Dataset(X, np.sin(X))
PARAMS = {"a": np.ones((1, 3)) / 3, "b": np.ones((3, 1))}
SGD = optax.sgd(0.1)
LABELS = optax.losses.softmax_cross_entropy_with_integer_labels


def model(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


def coupled(params, x):
    y = model(params, x)
    return y - jnp.mean(y)


def two(params, x):
    y = model(params, x)
    return y, 2 * y


WRONG = {
    "no function": ({"f": 3}, TypeError, "`f` must be a model function"),
    "no pair": ({"data": X}, TypeError, "`data` must be Dataset"),
    "examples that see each other": ({"f": coupled}, ValueError, "examples see each other|batch"),
    "two outputs": ({"f": two}, TypeError, "`f` must return one array for a comparison"),
    "whole params": (
        {"params": {"a": np.ones((1, 3), int), "b": np.ones((3, 1))}},
        TypeError,
        "`params`.* must hold floats",
    ),
    "params of another model": (
        {"params": {"a": np.ones((2, 3)), "b": np.ones((3, 1))}},
        ValueError,
        "must fit the model",
    ),
    "params that are not finite": (
        {"params": {"a": np.full((1, 3), np.nan), "b": np.ones((3, 1))}},
        ValueError,
        "`params` must be finite",
    ),
    "y of another shape": ({"data": Dataset(X, X[:, 0])}, ValueError, "`y` must have shape"),
    "y of other examples": ({"data": Dataset(X, X[:5])}, ValueError, "must"),
    "y that is not finite": (
        {"data": Dataset(X, np.where(X[0] == X, np.inf, X))},
        ValueError,
        "`data.y` must be finite",
    ),
    "whole y": (
        {"data": Dataset(X, np.ones((8, 1), int))},
        TypeError,
        "`data.y`.* must hold floats",
    ),
    "no examples": ({"data": Dataset(X[:0], X[:0])}, ValueError, "at least one example"),
    "no steps": ({"steps": 0}, ValueError, "`steps` must be at least 1, got 0"),
    "half a step": ({"steps": 2.5}, TypeError, "`steps` must be a whole number"),
    "a batch of none": ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
    "half an example": ({"batch_size": 1.5}, TypeError, "`batch_size` must be a whole number"),
    "mini-batches without a key": ({"batch_size": 3}, ValueError, "`key` must be given"),
    "a loss by name": ({"loss": "mse"}, TypeError, "`loss` must be callable, got str"),
    "a loss of labels": ({"loss": LABELS}, (TypeError, ValueError), "`data.y`|labels"),
    "test points of others": (
        {"test": np.ones((3, 2))},
        ValueError,
        "`test` must hold examples like those of `data.x`",
    ),
    "test points in a dict": (
        {"test": {"x": X}},
        ValueError,
        "`test` must hold examples like those of `data.x`",
    ),
    "a test point without a batch": (
        {"test": np.ones(())},
        ValueError,
        "`test` must have the batch on axis 0",
    ),
    "test points that are not finite": (
        {"test": np.where(X[0] == X, np.nan, X)},
        ValueError,
        "`test` must be finite",
    ),
    "targets of other tests": (
        {"test": Dataset(X, X[:3])},
        ValueError,
        "`test` must have one target for each of its 8 examples, got 3",
    ),
    "tests of another shape of y": (
        {"test": Dataset(X, X[:, 0])},
        ValueError,
        "`test.y` must hold examples like those of `data.y`",
    ),
    "another tree as anchor": (
        {"anchor": np.ones(3)},
        ValueError,
        "`anchor` must have the structure of `params`",
    ),
    "another shape as anchor": (
        {"anchor": {"a": np.ones((1, 4)), "b": np.ones((3, 1))}},
        ValueError,
        "`anchor`.* must have shape",
    ),
    "alpha of 0": ({"alpha": 0.0}, ValueError, "`alpha` must be positive"),
    "a table of alphas": ({"alpha": np.ones((2, 2))}, ValueError, "`alpha` must be a number or a"),
    "no alphas": ({"alpha": ()}, ValueError, "`alpha` must be a number or a list"),
    "memory in words": ({"memory": "much"}, ValueError, "`memory` must be an amount"),
    "memory of none": ({"memory": None}, TypeError, "`memory` must be an amount"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused(name, monkeypatch):
    change, kind, message = WRONG[name]
    given = {"f": model, "params": PARAMS, "data": DATA, "optimizer": SGD, "steps": 3} | change
    positional = [given.pop(k) for k in ("f", "params", "data", "optimizer")]
    with pytest.raises(kind, match=message):
        compare(*positional, **given)


def test_members_that_differ_in_number_are_refused():
    several = {"a": jnp.ones((2, 1, 3)), "b": jnp.ones((3, 3, 1))}
    with pytest.raises(ValueError, match="`params` must have the batch on axis 0"):
        compare_ensemble(model, several, DATA, SGD, steps=3)


@pytest.mark.thorough
def test_figures_without_test_points_take_no_target():
    without = compare(model, PARAMS, DATA, SGD, steps=3)
    with pytest.raises(ValueError, match="`target` must have one value for each of the 0 test"):
        without.plot(target=np.ones(3))


@pytest.mark.thorough
def test_another_run_does_not_go_on_from_a_checkpoint(tmp_path):
    compare(model, PARAMS, DATA, SGD, steps=3, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="`checkpoint` must be of this very run"):
        compare(model, PARAMS, DATA, SGD, steps=4, checkpoint=tmp_path)


def test_measures_refuse_what_they_cannot_take():
    with pytest.raises(TypeError, match="`params`.* must hold floats"):
        sharpness(model, jax.tree.map(lambda w: w.astype(int), PARAMS), DATA)
    with pytest.raises(ValueError, match="`depth` must be at least 1"):
        sharpness(model, PARAMS, DATA, depth=0)
    with pytest.raises(TypeError, match="`f` must be a model function"):
        relu_inputs(3, PARAMS, X)
    with pytest.raises(ValueError, match="must fit the model"):
        relu_inputs(model, PARAMS, jnp.ones((3, 2)))
    assert train(model, PARAMS, DATA, SGD, steps=1).plot().axes[0].get_title() == "training loss"
