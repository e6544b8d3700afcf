import itertools
import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from thoroughness import few

from lazyjax.checkpoints import load_history, save_history
from lazyjax.data import batch_indices
from lazyjax.dynamics import gradient_descent
from lazyjax.kernels import ntk
from lazyjax.spectrum import critical_learning_rate
from lazyjax.tangent import center, linearize, scale
from lazyjax.training import log_grid, progress, scale_loss, train, train_ensemble
from lazyjax.types import Dataset

OPTIMIZERS = {
    "adamw with a schedule": optax.adamw(optax.cosine_decay_schedule(1e-2, 50)),
    "sgd": optax.sgd(0.05),
    "heavy ball": optax.sgd(0.02, momentum=0.9),
    "adam": optax.adam(1e-2),
    "lbfgs-free chain": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
}


def mlp(params, x):
    h = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return h @ params["output"]["kernel"]


def initial(seed, width=6):
    normal = np.random.default_rng(seed).normal
    return {
        "hidden": {"kernel": normal(size=(1, width)), "bias": np.zeros((1, width))},
        "output": {"kernel": normal(size=(width, 1)) / width**0.5},
    }


def stack(*trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


@pytest.fixture
def data():
    # without symmetry: no gradient is 0 but for rounding, which Adam would divide by its epsilon
    x = np.linspace(-1, 1, 12)[:, None]
    return Dataset(x, np.sin(3 * x + 0.5))


def by_hand(f, params, data, optimizer, steps, loss=optax.losses.squared_error, batches=None):
    """The slow reference: a Python loop; gives losses and all parameters."""

    @jax.jit
    def step(params, state, x, y):
        value, gradient = jax.value_and_grad(lambda w: jnp.mean(loss(f(w, x), y)))(params)
        updates, state = optimizer.update(gradient, state, params)
        return value, optax.apply_updates(params, updates), state

    state, losses, trajectory = optimizer.init(params), [], []
    x, y = map(np.asarray, data)
    for t in range(steps + 1):
        batch = data if batches is None else Dataset(x[batches[t]], y[batches[t]])
        value, after, state = step(params, state, *batch)
        losses.append(value)
        trajectory.append(params)
        params = after
    return np.array(losses), jax.tree.map(lambda *w: np.stack(w), *trajectory)


ASKING = {  # optimisers that ask for more than the gradient, and for what
    "a line search": (
        optax.chain(
            optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)
        ),
        ("value", "grad", "value_fn"),
    ),
    "SAM, its steps hidden": (
        optax.contrib.sam(optax.sgd(0.05), optax.sgd(0.1), opaque_mode=True, reset_state=False),
        ("grad_fn",),
    ),
    "L-BFGS": (optax.lbfgs(), ("value", "grad", "value_fn")),
    "Polyak's step": (optax.polyak_sgd(max_learning_rate=0.1), ("value",)),
    "Momo": (optax.contrib.momo(learning_rate=0.1), ("value",)),
    "reduce on plateau": (
        optax.chain(
            optax.sgd(0.1), optax.contrib.reduce_on_plateau(factor=0.5, patience=2, cooldown=1)
        ),
        ("value",),
    ),
    "SAM": (optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1)), ()),
}


def by_hand_asking(f, params, batches, name):
    """The slow reference, with what these optimisers ask for, as Optax' documentation has it."""
    optimizer, asked = ASKING[name]

    @jax.jit
    def step(params, state, batch):
        value_fn = lambda w: jnp.mean(jnp.square(f(w, batch.x) - batch.y))  # noqa: E731 (one line)
        value, grad = jax.value_and_grad(value_fn)(params)
        known = {"value": value, "grad": grad, "value_fn": value_fn}
        known["grad_fn"] = lambda w, _: jax.grad(value_fn)(w)
        extra = {name: known[name] for name in asked}
        updates, state = optimizer.update(grad, state, params, **extra)
        return value, optax.apply_updates(params, updates), state

    state, losses = optimizer.init(params), []
    for batch in batches:
        value, params, state = step(params, state, batch)
        losses.append(value)
    return np.array(losses)


@few("name", ASKING, 2)
def test_optimizers_that_ask_for_the_loss_or_the_function_have_it(name, data):
    losses = by_hand_asking(mlp, initial(3), [data] * 31, name)
    history = train(mlp, initial(3), data, ASKING[name][0], steps=30, chunk_steps=12)
    np.testing.assert_allclose(history.loss, losses, rtol=1e-7)
    assert losses[-1] < losses[0] / 2


@pytest.mark.thorough
def test_members_of_an_ensemble_search_along_their_own_lines(data):
    params, (optimizer, _) = [initial(0), initial(1)], ASKING["L-BFGS"]
    runs = [train(mlp, w, data, optimizer, steps=10) for w in params]
    history = train_ensemble(mlp, stack(*params), data, optimizer, steps=10)
    np.testing.assert_allclose(history.loss, [run.loss for run in runs], rtol=1e-6)


@pytest.mark.thorough
def test_a_line_search_has_the_loss_of_its_batch(data):
    key, name = jax.random.key(0), "a line search"
    rows = np.asarray(batch_indices(key, 0, n=12, batch_size=4, steps=41))
    batches = [Dataset(data.x[row], data.y[row]) for row in rows]
    losses = by_hand_asking(mlp, initial(0), batches, name)
    optimizer, _ = ASKING[name]
    history = train(mlp, initial(0), data, optimizer, steps=40, key=key, batch_size=4)
    np.testing.assert_allclose(history.loss, losses, rtol=1e-7)


def gaussian(prediction, y):
    mean, log_variance = prediction[:, :1], prediction[:, 1:]
    return jnp.square(y - mean) / jnp.exp(log_variance) + log_variance


def masked(prediction, y):
    return y["weight"] * jnp.square(prediction - y["value"])


def quantiles(prediction, y):
    levels = jnp.array([[0.1, 0.5, 0.9]])
    return jnp.maximum(levels * (y - prediction), (levels - 1) * (y - prediction))


TWO = lambda w, x: x @ w["a"] + w["b"]  # noqa: E731 (a function of one line)


OTHER_SHAPES = {
    "a mask in a dict": (
        masked,
        1,
        lambda y: {"value": y, "weight": (jnp.arange(12.0) % 2)[:, None]},
    ),
    "a Gaussian likelihood": (gaussian, 2, lambda y: y),
    "quantiles": (quantiles, 3, lambda y: y),
    "a column squeezed inside": (lambda p, y: jnp.square(p[:, 0] - y), 1, lambda y: y[:, 0]),
}


@few("name", OTHER_SHAPES)
def test_targets_of_another_shape_are_the_affair_of_the_loss(name, data):
    loss, outputs, target = OTHER_SHAPES[name]
    w = {"a": jnp.ones((1, outputs)) / 2, "b": jnp.zeros((1, outputs))}
    goal = Dataset(data.x, target(data.y))
    history = train(TWO, w, goal, optax.sgd(0.02), steps=20, loss=loss)

    @jax.jit
    def step(w):
        value, gradient = jax.value_and_grad(lambda w: jnp.mean(loss(TWO(w, data.x), goal.y)))(w)
        return value, jax.tree.map(lambda w, g: w - 0.02 * g, w, gradient)

    for value in history.loss:
        expected, w = step(w)
        assert value == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(
    ("loss", "shape", "message"),
    [
        (optax.losses.squared_error, (12,), r"`y` must have shape \(12, 1\), got \(12,\)"),
        (optax.losses.huber_loss, (12,), r"`y` must have shape \(12, 1\), got \(12,\)"),
        (optax.losses.log_cosh, (12, 2), r"`y` must have shape \(12, 1\), got \(12, 2\)"),
        (optax.losses.sigmoid_binary_cross_entropy, (12,), r"`y` must have shape \(12, 1\)"),
        (lambda p, y: jnp.square(p - y), (12,), r"broadcasts every label .* y\[:, None\]"),
        (lambda p, y: jnp.mean(jnp.square(p - y)), (12,), r"broadcasts every label against"),
        (lambda p, y: p - y["value"], (12, 1), "`data.y` must be labels that `loss` takes, got"),
    ],
)
def test_float_targets_that_a_loss_would_broadcast_are_refused(loss, shape, message, data):
    with pytest.raises(ValueError, match=message):
        train(mlp, initial(0), Dataset(data.x, jnp.ones(shape)), optax.sgd(0.1), steps=3, loss=loss)


@few("name", OPTIMIZERS)
def test_a_run_is_the_plain_loop(name, data):
    losses, trajectory = by_hand(mlp, initial(0), data, OPTIMIZERS[name], 150)
    history = train(
        mlp, initial(0), data, OPTIMIZERS[name], steps=150, record=np.arange(151), chunk_steps=40
    )
    assert history.loss.shape == (151,)
    np.testing.assert_allclose(history.loss, losses, rtol=1e-10)
    for a, b in zip(jax.tree.leaves(history.params), jax.tree.leaves(trajectory), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_the_history_starts_at_w0_and_ends_at_the_last_step(data):
    history = train(mlp, initial(0), data, optax.sgd(0.05), steps=130)
    w0 = initial(0)
    assert history.steps[0] == 0
    assert history.steps[-1] == 130
    assert history.loss[0] == pytest.approx(float(jnp.mean((mlp(w0, data.x) - data.y) ** 2)))
    assert history.weight_movement[0] == 0
    for a, b in zip(jax.tree.leaves(history.at(0)), jax.tree.leaves(w0), strict=True):
        np.testing.assert_array_equal(a, b)
    final = float(jnp.mean((mlp(history.final, data.x) - data.y) ** 2))
    assert history.loss[-1] == pytest.approx(final, rel=1e-12)
    np.testing.assert_array_equal(history.data_loss, history.loss[history.steps])
    assert history.diverged_at is None


def test_movements_are_relative_to_the_start_by_layer(data):
    w0 = initial(0)
    history = train(mlp, w0, data, optax.sgd(0.05), steps=90, record=np.arange(91))

    def norm(tree):
        return np.sqrt(sum(np.sum(np.square(w)) for w in jax.tree.leaves(tree)))

    for t in (1, 7, 63, 64, 65, 90):
        delta = jax.tree.map(lambda a, b: a - b, history.at(t), w0)
        assert history.weight_movement[t] == pytest.approx(norm(delta) / norm(w0), rel=1e-12)
        layers = history.layer_movement
        assert set(layers) == {"hidden/kernel", "hidden/bias", "output/kernel"}
        own = norm(delta["output"]) / norm(w0["output"])
        assert layers["output/kernel"][t] == pytest.approx(own, rel=1e-12)
        borrowed = norm(delta["hidden"]["bias"]) / norm(w0)
        assert layers["hidden/bias"][t] == pytest.approx(borrowed, rel=1e-12)
    assert history.relative_to_all == ("hidden/bias",)


@pytest.mark.thorough
@pytest.mark.parametrize("chunk_steps", [1, 3, 64, 100, 1000])
def test_chunks_do_not_change_the_run(chunk_steps, data):
    whole = train(mlp, initial(0), data, optax.adam(0.01), steps=200)
    cut = train(mlp, initial(0), data, optax.adam(0.01), steps=200, chunk_steps=chunk_steps)
    np.testing.assert_allclose(cut.loss, whole.loss, rtol=1e-10)
    np.testing.assert_array_equal(cut.steps, whole.steps)
    np.testing.assert_allclose(cut.weight_movement, whole.weight_movement, rtol=1e-10)


def test_mini_batches_are_those_of_the_stream_and_the_loss_on_all_data_is_on_the_grid(data):
    key = jax.random.key(5)
    batches = np.asarray(batch_indices(key, 0, n=12, batch_size=5, steps=101))
    losses, trajectory = by_hand(mlp, initial(0), data, optax.sgd(0.02), 100, batches=batches)
    history = train(
        mlp, initial(0), data, optax.sgd(0.02), steps=100, key=key, batch_size=5, chunk_steps=30
    )
    np.testing.assert_allclose(history.loss, losses, rtol=1e-10)
    recorded = jax.tree.map(lambda w: w[history.steps], trajectory)
    outputs = jax.jit(jax.vmap(mlp, (0, None)))(recorded, data.x)
    on_all = np.mean(np.square(np.asarray(outputs) - np.asarray(data.y)[None]), axis=(1, 2))
    np.testing.assert_allclose(history.data_loss, on_all, rtol=1e-9)


@pytest.mark.thorough
def test_a_batch_size_of_n_or_more_is_full_batch(data):
    full = train(mlp, initial(0), data, optax.sgd(0.05), steps=20)
    large = train(mlp, initial(0), data, optax.sgd(0.05), steps=20, batch_size=30)
    np.testing.assert_array_equal(full.loss, large.loss)


@pytest.mark.thorough
def test_other_losses_and_integer_labels():
    x = np.random.default_rng(0).normal(size=(20, 3))
    data = Dataset(jnp.asarray(x), jnp.asarray(np.argmax(x, axis=1)))
    loss = optax.losses.softmax_cross_entropy_with_integer_labels
    history = train(
        lambda w, x: x @ w, jnp.zeros((3, 3)), data, optax.sgd(0.5), steps=60, loss=loss
    )
    losses, _ = by_hand(lambda w, x: x @ w, jnp.zeros((3, 3)), data, optax.sgd(0.5), 60, loss=loss)
    np.testing.assert_allclose(history.loss, losses, rtol=1e-11)


@pytest.mark.thorough
def test_an_ensemble_is_its_members_one_by_one(data):
    members = [initial(seed) for seed in range(3)]
    together = train_ensemble(mlp, stack(*members), data, optax.adam(0.01), steps=80)
    assert together.loss.shape == (3, 81)
    for i, params in enumerate(members):
        alone = train(mlp, params, data, optax.adam(0.01), steps=80)
        np.testing.assert_allclose(together.member(i).loss, alone.loss, rtol=1e-9)
        np.testing.assert_allclose(
            together.member(i).weight_movement, alone.weight_movement, rtol=1e-9
        )
        for a, b in zip(
            jax.tree.leaves(together.member(i).params), jax.tree.leaves(alone.params), strict=True
        ):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.thorough
def test_members_may_differ_in_anchor_alpha_and_data(data):
    anchors, alphas = [initial(0), initial(1)], jnp.array([1.0, 20.0])
    sets = [data, Dataset(data.x, jnp.cos(2 * data.x))]
    models = jax.vmap(lambda w, a: scale(center(linearize(mlp, w), w), a))(stack(*anchors), alphas)
    losses = jax.vmap(lambda a: scale_loss(optax.losses.squared_error, a))(alphas)
    together = train_ensemble(
        models, stack(*anchors), stack(*sets), optax.sgd(0.05), steps=50, loss=losses, data_axis=0
    )
    for i in range(2):
        f = scale(center(linearize(mlp, anchors[i]), anchors[i]), alphas[i])
        loss = scale_loss(optax.losses.squared_error, alphas[i])
        alone = train(f, anchors[i], sets[i], optax.sgd(0.05), steps=50, loss=loss)
        np.testing.assert_allclose(together.member(i).loss, alone.loss, rtol=1e-9)


@pytest.mark.thorough
def test_members_draw_their_own_batches(data):
    params = stack(initial(0), initial(0))
    history = train_ensemble(
        mlp, params, data, optax.sgd(0.05), steps=5, key=jax.random.key(0), batch_size=4
    )
    assert np.all(history.loss[0, 1:] != history.loss[1, 1:])


@pytest.mark.thorough
def test_the_loss_over_alpha_squared_keeps_the_learning_rate_free_of_alpha(data):
    w0 = initial(0)
    slow = train(
        scale(center(mlp, w0), 50.0),
        w0,
        data,
        optax.sgd(0.05),
        steps=40,
        loss=scale_loss(optax.losses.squared_error, 50.0),
    )
    same = train(scale(center(mlp, w0), 50.0), w0, data, optax.sgd(0.05 / 50**2), steps=40)
    np.testing.assert_allclose(slow.loss * 50**2, same.loss, rtol=1e-9)


@pytest.mark.thorough
def test_a_linear_model_is_its_tangent_model_at_every_step(data):
    def linear(params, x):
        return jnp.sin(x * jnp.arange(1.0, 6.0)[None]) @ params["w"] + params["b"]

    w0 = {"w": jnp.ones((5, 1)), "b": jnp.ones((1, 1))}
    settings = {"steps": 500, "record": np.arange(501)}
    network = train(linear, w0, data, optax.sgd(0.1), **settings)
    tangent = train(linearize(linear, w0), w0, data, optax.sgd(0.1), **settings)
    for a, b in zip(jax.tree.leaves(network.params), jax.tree.leaves(tangent.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(network.loss, tangent.loss, rtol=1e-10)


@few("momentum", [0.9, None])
def test_training_the_tangent_model_meets_the_closed_form(momentum, data):
    w0 = initial(0, width=20)
    f_lin = linearize(mlp, w0)
    kernel = ntk(mlp, w0, data.x)
    closed = gradient_descent(
        kernel, data.y, jax.jit(mlp)(w0, data.x), learning_rate=0.02, momentum=momentum or 0.0
    )
    history = train(f_lin, w0, data, optax.sgd(0.02, momentum=momentum), steps=2000)
    outputs = np.asarray(jax.jit(jax.vmap(f_lin, (0, None)))(history.params, data.x))
    change = np.linalg.norm(outputs[-1] - outputs[0])
    assert np.linalg.norm(outputs - closed.train(history.steps)) / change < 1e-10


# --- divergence


def test_a_run_that_diverges_warns_once_and_keeps_the_history_so_far(data):
    with pytest.warns(
        UserWarning, match="training diverged at step .* critical learning rate"
    ) as w:
        history = train(mlp, initial(0), data, optax.sgd(1e5), steps=400, record=np.arange(401))
    assert len(w) == 1
    told = float(re.search(r"at the anchor is (\S+) ", str(w[0].message))[1])
    assert told == pytest.approx(float(critical_learning_rate(ntk(mlp, initial(0), data.x))), 0.01)
    t = history.diverged_at
    assert 0 < t < 400
    assert np.all(np.isfinite(history.loss[:t]))
    assert np.all(np.isnan(history.loss[t:]))
    assert np.all(np.isnan(history.weight_movement[t:]))
    for w in jax.tree.leaves(history.params):
        assert np.all(np.isfinite(w))
        for s in (t, 400):
            np.testing.assert_array_equal(w[s], w[t - 1])


@pytest.mark.thorough
def test_divergence_past_the_end_is_none_of_the_run(data):
    with pytest.warns(UserWarning, match="diverged"):
        t = train(mlp, initial(0), data, optax.sgd(1e5), steps=400).diverged_at
    before = train(mlp, initial(0), data, optax.sgd(1e5), steps=t - 1)
    assert before.diverged_at is None
    assert np.all(np.isfinite(before.loss))


@pytest.mark.thorough
def test_the_critical_learning_rate_of_the_message_is_that_of_the_kernel(data):
    w0 = initial(0)
    largest = jnp.linalg.eigvalsh(ntk(mlp, w0, data.x)[:, :, 0, 0])[-1]
    with pytest.warns(UserWarning, match=f"is {12 / largest:.3g} "):
        train(mlp, w0, data, optax.sgd(1e5), steps=300)


@pytest.mark.thorough
def test_a_member_that_diverges_is_frozen_and_the_others_go_on(data):
    def f(params, x):
        return params["rate"] * mlp(params["net"], x)

    members = [{"rate": jnp.asarray(r), "net": initial(1)} for r in (1.0, 1e4, 1.0)]
    with pytest.warns(UserWarning, match=r"members \[1\] of 3 diverged, member 1 at step") as w:
        history = train_ensemble(f, stack(*members), data, optax.sgd(0.05), steps=150)
    assert len(w) == 1
    assert history.diverged_at[0] is None
    assert history.diverged_at[2] is None
    t = history.diverged_at[1]
    assert np.all(np.isnan(history.loss[1, t:]))
    assert np.all(np.isfinite(history.loss[[0, 2]]))
    assert all(np.all(np.isfinite(w)) for w in jax.tree.leaves(history.params))
    alone = train(f, members[2], data, optax.sgd(0.05), steps=150)
    np.testing.assert_allclose(history.member(2).loss, alone.loss, rtol=1e-9)


@pytest.mark.thorough
def test_mini_batches_that_diverge_leave_nan_on_the_grid(data):
    data = Dataset(data.x, jnp.sin(3 * data.x))
    with pytest.warns(UserWarning, match="diverged"):
        history = train(
            mlp, initial(0), data, optax.sgd(1e5), steps=300, key=jax.random.key(0), batch_size=4
        )
    late = history.steps >= history.diverged_at
    assert np.all(np.isnan(history.data_loss[late]))
    assert np.all(np.isfinite(history.data_loss[~late]))


# --- rounding


@pytest.mark.thorough
def test_an_alpha_beyond_rounding_warns_and_names_the_point(data):
    single = jax.tree.map(lambda w: w.astype(jnp.float32), (initial(0), data))
    w0, data32 = single[0], Dataset(*single[1])

    def run(alpha):
        return train(
            scale(center(mlp, w0), alpha),
            w0,
            data32,
            optax.sgd(0.05),
            steps=500,
            loss=scale_loss(optax.losses.squared_error, alpha),
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(10.0)
    with pytest.warns(UserWarning, match="rounding .* takes over.* reaches at alpha = ") as caught:
        run(1e5)
    named = float(str(caught[0].message).split("alpha = ")[1].split(". Train")[0])
    assert 10 < named < 1e5


# --- half precision, and weights of any size


def by_dtype(**dtypes):
    """The parameters with leaves of these dtypes, float32 where none is given."""
    w0 = initial(0)
    leaves = {"kernel": w0["hidden"]["kernel"], "bias": w0["hidden"]["bias"]}
    leaves["output"] = w0["output"]["kernel"]
    leaves = {name: w.astype(dtypes.get(name, jnp.float32)) for name, w in leaves.items()}
    output = {"kernel": leaves.pop("output")}
    return {"hidden": leaves, "output": output}


def exact_movements(params, w0):
    """Movements in float64: over all, and of each leaf against itself or against all."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(w0), strict=True)
    pairs = [(np.asarray(w, np.float64), np.asarray(v, np.float64)) for w, v in pairs]
    moved = [np.linalg.norm(w - v) for w, v in pairs]
    own = [np.linalg.norm(v) for _, v in pairs]
    everything = np.linalg.norm(own)
    layers = [m / (o or everything) for m, o in zip(moved, own, strict=True)]
    return np.linalg.norm(moved) / everything, layers


HALF = {
    "float16": dict.fromkeys(("kernel", "bias", "output"), jnp.float16),
    "bfloat16": dict.fromkeys(("kernel", "bias", "output"), jnp.bfloat16),
    "one float16 leaf": {"kernel": jnp.float16},
    "one bfloat16 leaf": {"bias": jnp.bfloat16},
}


@pytest.mark.filterwarnings("ignore:.*rounding")  # which half precision is near to
@few(("name", "batch_size"), itertools.product(HALF, [None, 5]))
def test_movements_and_losses_of_half_precision_are_taken_and_kept_in_float32(
    name, batch_size, data
):
    w0 = by_dtype(**HALF[name])
    single = Dataset(*(a.astype(jnp.float32) for a in data))
    history = train(
        mlp,
        w0,
        single,
        optax.sgd(0.05),
        steps=70,
        record=np.arange(71),
        key=jax.random.key(0),
        batch_size=batch_size,
    )
    for curve in (history.loss, history.data_loss, history.weight_movement):
        assert curve.dtype == np.float32
    kept = jax.tree.map(lambda w: w.dtype, history.params)
    assert kept == jax.tree.map(lambda w: w.dtype, w0)
    for t in (1, 30, 70):
        whole, layers = exact_movements(history.at(t), w0)
        assert history.weight_movement[t] == pytest.approx(whole, rel=1e-6)
        assert [history.layer_movement[n][t] for n in history.layer_movement] == pytest.approx(
            layers, rel=1e-6
        )


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:.*rounding")  # which half precision is near to
def test_an_ensemble_of_half_precision_moves_as_its_members(data):
    members = [by_dtype(**HALF["float16"]), by_dtype(**HALF["float16"])]
    members[1] = jax.tree.map(lambda w: 2 * w, members[1])
    history = train_ensemble(mlp, stack(*members), data, optax.sgd(0.02), steps=30)
    for i, w0 in enumerate(members):
        whole, _ = exact_movements(history.member(i).final, w0)
        assert history.weight_movement[i, -1] == pytest.approx(whole, rel=1e-6)


@few("dtype", [jnp.float16, jnp.bfloat16])
@few("loss", [optax.losses.squared_error, lambda prediction, y: prediction**2])
@pytest.mark.filterwarnings("ignore:.*rounding")  # which half precision is near to
def test_a_squared_error_of_300_in_half_precision_is_not_infinite(loss, dtype):
    data = Dataset(jnp.ones((4, 1), dtype), jnp.zeros((4, 1), dtype))
    f = lambda w, x: w * x  # noqa: E731 (a function of one line)
    history = train(f, jnp.asarray(300.0, dtype), data, optax.sgd(0.25), steps=2, loss=loss)
    assert history.loss.tolist() == [90_000, 22_500, 5625]
    assert history.params.tolist()[-1] == 75
    assert history.diverged_at is None


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_the_rounding_of_half_precision_is_told_with_its_cure(dtype, data):
    w0 = by_dtype(kernel=dtype)
    message = f"eps .*e-0{4 if dtype == jnp.float16 else 3}.* Train in float32"
    with pytest.warns(UserWarning, match=message):
        train(mlp, w0, Dataset(data.x, data.y), optax.sgd(1e-3), steps=30)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:.*rounding")  # which half precision is near to
def test_a_stopped_run_in_half_precision_goes_on_to_the_very_same_bits(data, tmp_path):
    def run(**options):
        settings = {"steps": 100, "chunk_steps": 30, "key": jax.random.key(3), "batch_size": 5}
        return train(
            mlp, by_dtype(**HALF["bfloat16"]), data, optax.sgd(0.02), **settings, **options
        )

    with pytest.raises(Stop), progress(stop_after(1)):
        run(checkpoint=tmp_path / "run.npz")
    resumed = run(checkpoint=tmp_path / "run.npz")
    for a, b in zip(jax.tree.leaves(vars(run())), jax.tree.leaves(vars(resumed)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_half_precision_loss_over_alpha_squared_is_not_lost():
    loss = scale_loss(optax.losses.squared_error, 1000.0)
    value = loss(jnp.asarray(200.0, jnp.float16), jnp.asarray(0.0, jnp.float16))
    assert value.dtype == jnp.float32
    wide = scale_loss(lambda prediction, y: prediction - y, 1e25)
    assert wide(jnp.float32(1e30), jnp.float32(0)) == pytest.approx(1e-20, rel=1e-6)


@few("power", [-100, 100, -83, 83])
def test_movements_are_free_of_the_size_of_the_weights(power, data):
    size = np.float32(2.0) ** power

    w0 = jax.tree.map(lambda w: w * size, by_dtype())
    f = lambda w, x: mlp(jax.tree.map(lambda a: a / size, w), x)  # noqa: E731 (a function of one line)
    optimizer = optax.chain(optax.scale_by_sign(), optax.scale(-0.01 * size))
    single = Dataset(*(a.astype(jnp.float32) for a in data))
    history = train(f, w0, single, optimizer, steps=40, record=np.arange(41))
    for t in (1, 40):
        whole, layers = exact_movements(history.at(t), w0)
        assert whole > 0.01
        assert history.weight_movement[t] == pytest.approx(whole, rel=1e-6)
        assert [v[t] for v in history.layer_movement.values()] == pytest.approx(layers, rel=1e-6)


@pytest.mark.thorough
def test_weights_may_grow_from_next_to_nothing():
    data = Dataset(jnp.ones((4, 1), jnp.float32), jnp.ones((4, 1), jnp.float32))
    f = lambda w, x: w * x  # noqa: E731 (a function of one line)
    starts = np.array([1e-25, 2.0, 1e-30], np.float32)
    together = train_ensemble(f, starts, data, optax.sgd(0.25), steps=1)
    for i, grown in enumerate((0.5e25, 0.25, 0.5e30)):
        alone = train(f, starts[i], data, optax.sgd(0.25), steps=1)
        for history in (alone, together.member(i)):
            assert history.weight_movement.tolist() == pytest.approx([0, grown], rel=1e-6)


@pytest.mark.thorough
def test_a_run_that_diverges_at_once_has_no_movement_to_warn_of(data):
    single = Dataset(data.x.astype(jnp.float32), jnp.full((12, 1), 1e30, jnp.float32))
    with pytest.warns(UserWarning, match="training diverged at step 0") as caught:
        history = train(mlp, by_dtype(), single, optax.sgd(0.1), steps=3)
    assert len(caught) == 1
    assert np.all(np.isnan(history.weight_movement))


# --- stopping and going on


class Stop(Exception):
    pass


def stop_after(chunks):
    count = iter(range(chunks))

    def callback(done, total, label):
        if next(count, None) is None:
            raise Stop

    return callback


@few(("chunks", "members"), [(3, None), (0, 2), (0, None), (3, 2)])
def test_a_stopped_run_goes_on_to_the_very_same_bits(chunks, members, data, tmp_path):
    params = initial(0) if members is None else stack(initial(0), initial(1))

    def run(**options):
        function = train if members is None else train_ensemble
        return function(
            mlp,
            params,
            data,
            optax.adam(0.01),
            steps=200,
            key=jax.random.key(3),
            batch_size=5,
            chunk_steps=30,
            **options,
        )

    undisturbed = run()
    file = tmp_path / "run.npz"
    with pytest.raises(Stop), progress(stop_after(chunks)):
        run(checkpoint=file)
    seen = []
    with progress(lambda done, total, label: seen.append(done)):
        resumed = run(checkpoint=file)
    assert len(seen) == 7 - (chunks + 1)
    for a, b in zip(
        jax.tree.leaves(vars(undisturbed)), jax.tree.leaves(vars(resumed)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.thorough
def test_a_finished_run_is_read_back_without_a_step(data, tmp_path):
    options = {"steps": 50, "checkpoint": tmp_path / "run.npz"}
    first = train(mlp, initial(0), data, optax.sgd(0.05), **options)
    seen = []
    with progress(lambda *where: seen.append(where)):
        again = train(mlp, initial(0), data, optax.sgd(0.05), **options)
    assert seen == []
    np.testing.assert_array_equal(first.loss, again.loss)


@pytest.mark.thorough
def test_a_checkpoint_fits_the_same_run_in_another_process(tmp_path):
    script = """
import jax, jax.numpy as jnp, optax, sys
from lazyjax.training import train, progress
from lazyjax.types import Dataset
data = Dataset(jnp.ones((4, 1)), jnp.ones((4, 1)))
seen = []
with progress(lambda *where: seen.append(where)):
    f = lambda w, x: jax.nn.relu(w * x)
    train(f, jnp.ones(()) / 2, data, optax.adam(0.1), steps=9, checkpoint=sys.argv[1])
print(len(seen))
"""
    counts = [
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "run.npz")],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for _ in range(2)
    ]
    assert counts == ["1", "0"]


@pytest.mark.parametrize(
    "change",
    [{"steps": 60}, {"optimizer": optax.sgd(0.06)}, {"seed": 1}, {"loss": optax.losses.huber_loss}],
)
def test_a_checkpoint_of_another_run_is_refused(change, data, tmp_path):
    def run(*, seed=0, **options):
        given = {"optimizer": OPTIMIZERS["sgd"], "steps": 50, "checkpoint": tmp_path / "run.npz"}
        return train(mlp, initial(seed), data, **(given | options))

    run()
    with pytest.raises(ValueError, match="`checkpoint` must be of this very run, got"):
        run(**change)


@pytest.mark.thorough
def test_an_array_that_a_jit_in_the_model_holds_tells_runs_apart(data, tmp_path):
    def run(constant):
        inner = jax.jit(lambda params, x: mlp(params, x) * np.full((1, 1), constant))
        f = lambda params, x: inner(params, x)  # noqa: E731 (a function of one line)
        file = tmp_path / "run.npz"
        return train(f, initial(0), data, OPTIMIZERS["sgd"], steps=20, checkpoint=file)

    run(1.0)
    with pytest.raises(ValueError, match="`checkpoint` must be of this very run, got"):
        run(2.0)


def test_a_broken_checkpoint_is_refused(data, tmp_path):
    file = tmp_path / "run.npz"
    train(mlp, initial(0), data, optax.sgd(0.05), steps=50, checkpoint=file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match="`path` must be a whole file.*Delete it"):
        train(mlp, initial(0), data, optax.sgd(0.05), steps=50, checkpoint=file)


@few("members", [None, 2])
def test_a_history_comes_back_as_it_was_saved(members, data, tmp_path):
    params = initial(0) if members is None else stack(initial(0), initial(1))
    function = train if members is None else train_ensemble
    history = function(mlp, params, data, OPTIMIZERS["sgd"], steps=50)
    save_history(tmp_path / "history.npz", history)
    again = load_history(tmp_path / "history.npz", initial(0))
    assert again.relative_to_all == history.relative_to_all
    assert again.diverged_at == history.diverged_at
    assert list(again.layer_movement) == list(history.layer_movement)
    for a, b in zip(jax.tree.leaves(vars(history)), jax.tree.leaves(vars(again)), strict=True):
        np.testing.assert_array_equal(a, b)


# --- the grid, progress, bad input


def test_the_grid_is_log_spaced_and_holds_both_ends():
    grid = log_grid(50_000)
    assert grid[0] == 0
    assert grid[-1] == 50_000
    assert len(grid) <= 100
    assert np.all(np.diff(grid) > 0)
    np.testing.assert_allclose(np.diff(np.log1p(grid[-30:])), np.log1p(50_000) / 99, rtol=0.02)


def test_progress_tells_steps_done_and_the_label(data):
    seen = []
    with progress(lambda *where: seen.append(where)):
        train(mlp, initial(0), data, OPTIMIZERS["sgd"], steps=100, chunk_steps=50, label="network")
    assert [where[1:] for where in seen] == [(100, "network")] * len(seen)
    assert seen[-1][0] == 100
    told = len(seen)
    train(mlp, initial(0), data, OPTIMIZERS["sgd"], steps=100, chunk_steps=50)
    assert len(seen) == told


BAD = {
    "y of shape (n,)": ({"y": np.zeros(12)}, ValueError, r"`y` must have shape \(12, 1\), got"),
    "y of integers": ({"y": np.zeros((12, 1), int)}, TypeError, "`data.y` must hold floats"),
    "NaN in x": ({"x": np.full((12, 1), np.nan)}, ValueError, "must be finite, got 12 values"),
    "NaN in y": ({"y": np.full((12, 1), np.nan)}, ValueError, "must be finite, got 12 values"),
    "an empty batch": ({"x": np.zeros((0, 1)), "y": np.zeros((0, 1))}, ValueError, "one example"),
    "fewer targets": ({"y": np.zeros((5, 1))}, ValueError, "must"),
    "no steps": ({"steps": 0}, ValueError, "`steps` must be at least 1, got 0"),
    "half a step": ({"steps": 1.5}, TypeError, "`steps` must be a whole number, got 1.5"),
    "too many steps": ({"steps": 2**31}, ValueError, "`steps` must be below 2"),
    "an empty mini-batch": ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
    "mini-batches without key": ({"batch_size": 3}, ValueError, "`key` must be given"),
    "an empty chunk": ({"chunk_steps": 0}, ValueError, "`chunk_steps` must be at least 1"),
    "a grid that falls": ({"record": [3, 2]}, ValueError, "`record` must be whole steps"),
    "a grid past the end": ({"record": [0, 99]}, ValueError, "`record` must be whole steps"),
    "one grid point": ({"record": 1}, ValueError, "`points` must be at least 2"),
    "a loss that is no function": ({"loss": "mse"}, TypeError, "`loss` must be callable, got str"),
    "a model that is no function": ({"f": 3}, TypeError, "`f` must be a model function.*got int"),
    "no dataset": ({"data": 3}, TypeError, r"`data` must be Dataset\(x, y\), got int"),
    "integer parameters": ({"params": {"w": np.zeros((1, 1), int)}}, TypeError, "`params`"),
    "complex parameters": (
        {"params": {"w": np.zeros((1, 1), complex)}},
        TypeError,
        r"`params`\['w'\] must be real, got complex128. Split it into a real and an imaginary part in",
    ),
    "complex targets": (
        {"y": np.zeros((12, 1), complex)},
        TypeError,
        "`data.y` must be real, got complex128. Split it into a real and an imaginary part.$",
    ),
    "NaN parameters": ({"params": np.full((1, 1), np.nan)}, ValueError, "`params` must be finite"),
    "parameters of another model": ({"params": {"w": np.zeros((1, 1))}}, ValueError, "must fit"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_any_work(name, data):
    change, error, message = BAD[name]
    given = {"f": mlp, "params": initial(0), "steps": 10, "x": data.x, "y": data.y} | change
    x, y = given.pop("x"), given.pop("y")
    given.setdefault("data", Dataset(x, y))
    seen = []
    with progress(lambda *where: seen.append(where)), pytest.raises(error, match=message):
        train(optimizer=optax.sgd(0.1), **given)
    assert seen == []


BINARY = optax.losses.sigmoid_binary_cross_entropy
CLASSES = optax.losses.softmax_cross_entropy_with_integer_labels
PAIRED = {  # a loss, the shapes of labels and predictions, the cure
    "values": (BINARY, (12,), (12, 1), r"Use y\[:, None\]"),
    "a mean": (lambda p, y: jnp.mean(BINARY(p, y)), (12,), (12, 1), r"Use y\[:, None\]"),
    "means of rows": (lambda p, y: jnp.mean(BINARY(p, y), -1), (12,), (12, 1), r"Use y\[:, None"),
    "flat values": (lambda p, y: jnp.ravel(BINARY(p, y)), (12,), (12, 1), r"Use y\[:, None\]"),
    "a jit": (jax.jit(lambda p, y: jnp.mean(BINARY(p, y))), (12,), (12, 1), r"Use y\[:, None\]"),
    "weights": (lambda p, y: np.ones(12) * BINARY(p, y), (12,), (12, 1), r"Use y\[:, None\]"),
    "huber": (optax.losses.huber_loss, (12,), (12, 1), r"Use y\[:, None\]"),
    "as many outputs as examples": (BINARY, (12,), (12, 12), "Pass one label for each"),
    "their mean": (lambda p, y: jnp.mean(BINARY(p, y)), (12,), (12, 12), "Pass one label for each"),
    "an axis too much": (BINARY, (12, 1), (12,), r"Use y\[..., 0\]"),
    "sequences": (BINARY, (12, 12), (12, 12, 1), r"Use y\[..., None\]"),
}


@pytest.mark.parametrize("ensemble", [False, True])
@pytest.mark.parametrize("rank_promotion", ["allow", "raise"])
@pytest.mark.parametrize("name", PAIRED)
def test_labels_that_are_broadcast_against_all_predictions_are_refused(
    name, rank_promotion, ensemble, data
):
    loss, labels, outputs, cure = PAIRED[name]
    y = jnp.arange(np.prod(labels)).reshape(labels) % 2
    ones = jnp.ones((1,) * (len(outputs) > 1) + outputs[1:])
    f = lambda w, x: w * x.reshape(-1, *(1,) * (len(outputs) - 1)) * ones  # noqa: E731 (a function of one line)
    run, w = (train_ensemble, jnp.ones(2)) if ensemble else (train, jnp.ones(()))
    with (
        jax.numpy_rank_promotion(rank_promotion),
        pytest.raises(ValueError, match=f"`data.y` must be labels that `loss` takes.*{cure}"),
    ):
        run(f, w, Dataset(data.x, y), optax.sgd(0.1), steps=3, loss=loss)


def ranking(p, y):  # every pair, on purpose
    return jnp.mean(jnp.where(y[:, None] > y[None], jax.nn.softplus(p.T - p), 0))


def weighted_classes(p, y):
    return -jnp.mean(
        jnp.sum(np.ones(p.shape[1]) * jax.nn.one_hot(y, 12) * jax.nn.log_softmax(p), 1)
    )


LABELLED = {  # a loss that takes labels (12,), and how many outputs
    "similar pairs": (
        lambda p, y: jnp.mean(jnp.where(y[:, None] == y[None], -jax.nn.log_softmax(p @ p.T), 0)),
        4,
    ),
    "squeezed": (lambda p, y: BINARY(p[:, 0], y), 1),
    "a squeezed mean": (lambda p, y: jnp.mean(BINARY(jnp.squeeze(p, -1), y)), 1),
    "a column made inside": (lambda p, y: BINARY(p, y[:, None]), 1),
    "weights of the examples": (lambda p, y: np.arange(12) * BINARY(p[:, 0], y), 1),
    "ranking": (ranking, 1),
    "classes": (CLASSES, 3),
    "as many classes as examples": (CLASSES, 12),
    "a mean over as many classes": (lambda p, y: jnp.mean(CLASSES(p, y)), 12),
    "one-hot inside": (
        lambda p, y: optax.losses.softmax_cross_entropy(p, jax.nn.one_hot(y, 12)),
        12,
    ),
    "weights of the classes": (weighted_classes, 12),
}


@few("name", LABELLED, 2)
def test_losses_that_take_labels_by_example_train(name, data):
    loss, outputs = LABELLED[name]
    draw = np.random.default_rng(0).normal
    x, w = draw(size=(12, 3)), draw(size=(3, outputs)) / 10
    y = (x[:, 0] > 0).astype(int)
    with jax.numpy_rank_promotion("allow"):
        history = train(lambda w, x: x @ w, w, Dataset(x, y), optax.sgd(0.1), steps=20, loss=loss)
    assert history.loss[-1] < history.loss[0]


@pytest.mark.thorough
def test_examples_may_see_each_other_where_the_batch_is_whole():
    x = jax.random.normal(jax.random.key(0), (12, 3))
    both = lambda p, y: CLASSES(p, y) + CLASSES(p.T, y)  # noqa: E731 (a function of one line)
    f = lambda w, x: (x @ w) @ (x @ w).T  # noqa: E731 (a function of one line)
    history = train(
        f, jnp.ones((3, 4)) / 3, Dataset(x, jnp.arange(12)), optax.sgd(0.01), steps=20, loss=both
    )
    assert history.loss[-1] < history.loss[0]


def test_labels_that_do_not_fit_the_loss_get_a_sentence(data):
    message = r"`data.y` must be labels that `loss` takes, got shape \(12,\) for predictions"
    with pytest.raises(ValueError, match=message):
        train(
            lambda w, x: w * x * jnp.ones((1, 5)),
            jnp.ones(()),
            Dataset(data.x, jnp.arange(12)),
            optax.sgd(0.1),
            steps=3,
            loss=BINARY,
        )


@pytest.mark.parametrize("transform", [lambda f, w: f, linearize])
def test_a_model_without_reverse_mode_is_refused_before_any_work(transform, data):
    def loop(w, x):
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * w), (0, x))[1]

    f, seen = transform(loop, jnp.ones(())), []
    message = "`f` must have a derivative in reverse mode.*lax.scan.*custom_vjp"
    with progress(lambda *where: seen.append(where)):
        with pytest.raises(ValueError, match=message):
            train(f, jnp.ones(()), data, optax.sgd(0.1), steps=3)
        with pytest.raises(ValueError, match=message):
            train_ensemble(loop, jnp.ones(2), data, optax.sgd(0.1), steps=3)
    assert seen == []


def test_an_error_of_the_optimizer_stays_its_own(data):
    def update(gradient, state, params=None):
        raise RuntimeError("no update")

    optimizer = optax.GradientTransformation(lambda params: (), update)
    with pytest.raises(RuntimeError, match="no update"):
        train(mlp, initial(0), data, optimizer, steps=3)


def test_bad_ensembles_are_refused(data):
    params = stack(initial(0), initial(1))
    with pytest.raises(ValueError, match="must have the members on axis 0"):
        train_ensemble(linearize(mlp, initial(0)), params, data, optax.sgd(0.1), steps=3)
    with pytest.raises(ValueError, match="`data_axis` must be None or 0, got 1"):
        train_ensemble(mlp, params, data, optax.sgd(0.1), steps=3, data_axis=1)
    with pytest.raises(ValueError, match=r"`y` must have shape \(12, 1\), got \(12,\)"):
        train_ensemble(mlp, params, Dataset(data.x, data.y[:, 0]), optax.sgd(0.1), steps=3)
    history = train(mlp, initial(0), data, OPTIMIZERS["sgd"], steps=50)
    with pytest.raises(TypeError, match="`member` is for the history of an ensemble"):
        history.member(0)
    with pytest.raises(ValueError, match="`alpha` must be positive"):
        scale_loss(optax.losses.squared_error, 0.0)
