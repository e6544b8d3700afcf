"""An ensemble beside its tangent models: the parts called by hand, and which optimisers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lazyjax import plots
from lazyjax.comparison import Comparison, HeavyBall, compare_ensemble, heavy_ball
from lazyjax.kernels import ntk
from lazyjax.metrics import relative_kernel_change
from lazyjax.spectrum import critical_learning_rate
from lazyjax.tangent import linearize
from lazyjax.training import scale_loss, train
from lazyjax.types import Dataset

TREE = {"a": np.ones((3, 2)), "b": np.ones(4)}
KNOWN = {
    "sgd": (optax.sgd(0.1), HeavyBall(0.1, 0.0)),
    "a heavy ball": (optax.sgd(0.03, 0.9), HeavyBall(0.03, 0.9)),
    "its parts": (optax.chain(optax.trace(0.5), optax.scale(-0.2)), HeavyBall(0.2, 0.5)),
    "a schedule that stays": (optax.sgd(optax.constant_schedule(0.2)), HeavyBall(0.2, 0.0)),
    "a rate that is state": (optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), (0.1, 0.0)),
    "an average of gradients": (
        optax.chain(optax.ema(0.9, debias=False), optax.sgd(0.1)),
        HeavyBall(0.01, 0.9),
    ),
}
OTHERS = {
    "Nesterov": optax.sgd(0.1, 0.9, nesterov=True),
    "Adam": optax.adam(0.1),
    "L-BFGS": optax.lbfgs(),
    "a cosine": optax.sgd(optax.cosine_decay_schedule(0.1, 100)),
    "a change at the end": optax.sgd(optax.piecewise_constant_schedule(0.1, {98: 0.5})),
    "decay": optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1)),
    "decay of one leaf": optax.chain(
        optax.add_decayed_weights(1e-4, mask={"a": False, "b": True}), optax.sgd(0.1)
    ),
    "clipping by the norm": optax.chain(optax.clip_by_global_norm(1e3), optax.sgd(0.1)),
    "clipping": optax.chain(optax.clip(500.0), optax.sgd(0.1)),
    "noise": optax.chain(optax.add_noise(1e-3, 0.5, 0), optax.sgd(0.1)),
    "every second step": optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
    "a rate for each leaf": optax.multi_transform(
        {"x": optax.sgd(0.1), "y": optax.sgd(0.2)}, {"a": "x", "b": "y"}
    ),
    "a frozen leaf": optax.multi_transform(
        {"x": optax.sgd(0.1), "y": optax.set_to_zero()}, {"a": "x", "b": "y"}
    ),
    "uphill": optax.sgd(-0.1),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_heavy_ball_is_known_by_what_it_does(name):
    optimizer, expected = KNOWN[name]
    assert heavy_ball(optimizer, TREE, 100) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_heavy_ball_all_the_way_is_none(name):
    assert heavy_ball(OTHERS[name], TREE, 100) is None


X, GRID = (np.random.default_rng(seed).normal(size=(n, 3)) for seed, n in enumerate((7, 4)))
DATA = Dataset(X, np.sin(X @ np.ones((3, 2))))


def model(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def start(seed):
    a, b = jax.random.split(jax.random.key(seed))
    return {"a": jax.random.normal(a, (3, 6)) / 2, "b": jax.random.normal(b, (6, 2)) / 3}


def both(seeds=(2, 3)):
    return jax.tree.map(lambda *w: jnp.stack(w), *map(start, seeds))


def rms(difference):
    return np.sqrt(np.mean(np.square(difference)))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("optimizer", "batch_size", "known"),
    [
        pytest.param(optax.sgd(0.05), 3, False, id="mini-batches"),
        pytest.param(optax.sgd(0.05, 0.5), None, True, id="a heavy ball"),
        pytest.param(optax.adam(0.01), None, False, id="Adam"),
    ],
)
def test_a_comparison_of_several_outputs_is_its_parts_by_hand(optimizer, batch_size, known):
    settings = {"steps": 40, "batch_size": batch_size}
    compared = compare_ensemble(
        model, both(), DATA, optimizer, test=GRID, key=jax.random.key(4), **settings
    )
    assert compared.members == 2
    w0 = start(3)
    own, again = (jax.random.split(jax.random.key(4), 2)[1] for _ in range(2))
    network = train(model, w0, DATA, optimizer, key=own, **settings)
    tangent = train(linearize(model, w0), w0, DATA, optimizer, key=again, **settings)
    np.testing.assert_allclose(compared.network.loss[1, -1], network.data_loss[-1], rtol=1e-9)
    np.testing.assert_allclose(compared.tangent.loss[1, -1], tangent.data_loss[-1], rtol=1e-9)
    for at in (0, len(compared.steps) // 2, -1):
        w, v = network.at(at), tangent.at(at)
        gap = model(w, X) - linearize(model, w0)(v, X)
        assert compared.gap_train[1, at] == pytest.approx(rms(gap), rel=1e-7, abs=1e-12)
        outputs = compared.network.test[1, at]
        np.testing.assert_allclose(outputs, model(w, GRID), rtol=1e-8, atol=1e-12)
    change = relative_kernel_change(
        ntk(model, network.final, X, reduce="trace"), ntk(model, w0, X, reduce="trace")
    )
    assert compared.kernel_change[1, -1] == pytest.approx(float(change), rel=1e-7)
    assert (compared.closed is not None) == known
    if compared.closed is None:
        assert np.all(np.isnan(compared.learning_rate)) == (batch_size is None)
        with pytest.raises(ValueError, match="`closed` must be there, got None"):
            _ = compared.closed_form
    else:
        assert compared.closed.gap.max() < 1e-12
        critical = critical_learning_rate(ntk(model, w0, X), momentum=0.5)
        assert compared.critical_learning_rate[1] == pytest.approx(float(critical), rel=1e-12)


@pytest.mark.thorough
def test_the_closed_form_knows_half_the_squares_and_alpha():
    alphas = np.array([2.0, 5.0])
    loss = scale_loss(optax.losses.l2_loss, alphas)
    compared = compare_ensemble(model, both(), DATA, optax.sgd(0.2), steps=60, test=GRID, loss=loss)
    closed = compared.closed_form
    assert closed.gap.max() < 1e-12
    at = np.isin(compared.curve_steps, compared.steps)
    where = np.isin(compared.steps, compared.curve_steps)
    np.testing.assert_allclose(closed.loss[:, where], compared.tangent.loss[:, at], rtol=1e-9)


@pytest.mark.thorough
def test_without_a_closed_form_a_comparison_is_kept_and_drawn():
    x = jnp.linspace(-1, 1, 6)[:, None]
    data = Dataset(x, jnp.sin(2 * x))
    f = lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"]  # noqa: E731 (a function of one line)
    w = {"a": jnp.ones((1, 1, 4)), "b": jnp.ones((1, 4, 1)) / 4}
    compared = compare_ensemble(f, w, data, optax.adam(0.01), steps=10, test=x)
    back = Comparison.of(compared.arrays("a/"), "a/")
    assert back.closed is None
    np.testing.assert_array_equal(back.network.test, compared.network.test)
    with plots.style():
        figures = plots.comparison(back)
    assert set(figures) == {"functions", "training", "layers", "kernels", "measures"}
    texts = [text.get_text() for text in figures["training"].axes[0].get_legend().get_texts()]
    assert texts == ["network", "tangent model"]


@pytest.mark.thorough
def test_large_data_have_the_kernel_of_a_sample_and_a_closed_form_by_products():
    x = jax.random.normal(jax.random.key(0), (1601, 1))
    f = lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"]  # noqa: E731 (a function of one line)
    w = {"a": jnp.ones((1, 1, 3)), "b": jnp.ones((1, 3, 2)) / 4}
    data = Dataset(x, jnp.concatenate([jnp.sin(x), x], 1))
    compared = compare_ensemble(f, w, data, optax.sgd(0.01), steps=2, test=x[:2])
    few = compared.kernel_examples
    assert compared.closed_form.gap.max() < 1e-8  # of 3202 outputs, without their kernel
    assert len(np.unique(few)) == 1000
    last = jax.tree.map(lambda a: a[0], compared.histories["network"].final)
    kernel = ntk(f, last, x[few], reduce="trace")
    np.testing.assert_allclose(compared.kernels[0, -1], kernel, rtol=1e-10)
