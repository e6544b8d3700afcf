"""Models whose examples see each other are found out by name; all others are let through."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.nn import softmax, tanh
from kernel_models import MLP, MODELS, convolve, examples, mlp, readout, weights
from thoroughness import few

from lazyjax.independence import check_examples, trial
from lazyjax.tangent import center

OTHERS = "`f` must treat each example alone, but the examples of a batch see each other: {}.*use_running_average=True"
RANDOM = "`f` must be deterministic, but its random numbers .*: {}.*deterministic=True"
POSITION = "`f` must treat each example alone, but its outputs change with the position .*: {}"
SIZE = (
    "`f` must treat each example alone, but its outputs change with the size .*: {}.*Divide by it"
)


class Case(NamedTuple):
    f: Any
    params: Any
    x: Any
    says: str = ""


WRONG: dict[str, Any] = {}
RIGHT: dict[str, Any] = {}


def wrong(name, says, f=None, x=(4,), rule=OTHERS, **shapes):
    """Add a model that is to be refused; without f, a decorator."""

    def add(f):
        assert name not in WRONG
        WRONG[name] = lambda: Case(f, weights(shapes or MLP), examples(x)[0], rule.format(says))
        return f

    return add(f) if f else add


def right(name, f=None, x=(4,), **shapes):
    """Add a model that is to be let through."""

    def add(f):
        assert name not in RIGHT
        RIGHT[name] = lambda: Case(f, weights(shapes or MLP), examples(x)[0])
        return f

    return add(f) if f else add


@pytest.fixture(autouse=True)
def _fresh_and_quick():
    trial._passed.clear()
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_rank_promotion("allow"):  # Flax layers promote their biases
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def each(table, *names):
    """Let a test run on every row of a table, and each time on those of some names."""
    return few("name", sorted(table, key=lambda name: name not in names), len(names))


def traced(case):
    """Check where no value is known."""
    jax.eval_shape(lambda p, x: check_examples(case.f, p, x), case.params, case.x)


# --- what is refused


def standardize(h, axis=0):
    return (h - h.mean(axis)) / jnp.sqrt(h.var(axis) + 1e-3)


def hidden(g):
    """Put g between the layers."""
    return lambda p, x: tanh(g(x @ p["a"]) @ p["b"]) @ p["c"]


wrong("batch norm by hand", "reduce_sum along the batch", hidden(standardize))
wrong("batch norm without an epsilon", "reduce_sum", hidden(lambda h: (h - h.mean(0)) / h.std(0)))
wrong("a softmax over the batch", "reduce_max along", hidden(lambda h: softmax(h, 0)))
wrong("less the mean over the batch", "reduce_sum", hidden(lambda h: h - h.mean(0)))
wrong("the sum over the batch", "reduce_sum", hidden(lambda h: jnp.broadcast_to(h.sum(0), h.shape)))
wrong("the largest of the batch", "reduce_max", hidden(lambda h: h / h.max(0)))
wrong("a cumulative sum", "cumsum", hidden(lambda h: jnp.cumsum(h, 0)))
wrong(
    "a cumulative maximum from behind", "cummax", hidden(lambda h: lax.cummax(h, 0, reverse=True))
)
wrong("examples in order", "sort", hidden(lambda h: jnp.sort(h, 0)))
wrong("examples reversed", "rev", hidden(lambda h: h[::-1]))
wrong("the next example", "slice", hidden(lambda h: jnp.roll(h, 1, 0)))
wrong("the next example, or nothing", "slice", hidden(lambda h: jnp.pad(h[1:], ((0, 1), (0, 0)))))
wrong(
    "the example before, by a pad",
    "pad",
    hidden(lambda h: lax.pad(h, 0.0, ((1, -1, 0), (0, 0, 0)))),
)
wrong(
    "a weight for each position, in a jit",
    "mul",
    lambda p, x: jax.jit(lambda y, i: y * i)(mlp(p, x), 1.0 + jnp.arange(len(x))[:, None]),
    rule=POSITION,
)
wrong("less the first example", "slice", hidden(lambda h: h - h[:1]))
wrong(
    "examples in another order",
    "gather along the batch",
    hidden(lambda h: jnp.take(h, (jnp.arange(len(h)) + 1) % len(h), 0)),
)
wrong(
    "less the first example, by a gather",
    "gather",
    hidden(lambda h: h - jnp.take(h, np.zeros(1, int), 0)),
)
wrong(
    "the batch as a window",
    "reduce_window",
    hidden(lambda h: nn.avg_pool(h[None, ..., None], (2, 1), padding="SAME")[0, ..., 0]),
)
wrong("a spectrum over the batch", "fft", hidden(lambda h: jnp.fft.fft(h, axis=0).real))
wrong("examples that are added into the first", "scatter", hidden(lambda h: h.at[0].add(h[1])))
wrong("a transposed reshape", "reshape", hidden(lambda h: h.reshape(h.shape[::-1]).T))
wrong(
    "a mean by a product",
    "dot_general",
    hidden(lambda h: h - jnp.full((len(h), len(h)), 1 / len(h)) @ h),
)
wrong(
    "whitened by the covariance",
    "dot_general",
    hidden(lambda h: h @ jnp.linalg.inv(jnp.eye(5) + h.T @ h)),
)
wrong("attention over the batch", "reduce_max", hidden(lambda h: softmax(h @ h.T) @ h))
wrong(
    "a mean over a folded batch",
    "reduce_sum",
    x=(3, 4),
    f=lambda p, x: readout(
        tanh(tanh(standardize((x @ p["a"]).reshape(-1, 5)) @ p["b"]).reshape(len(x), 3, 3))
    ),
)
wrong(
    "the mean by a collective",
    "psum along the batch\\. ",
    hidden(jax.vmap(lambda h: h - lax.pmean(h, "batch"), axis_name="batch")),
)
wrong("divided by the size of the batch", "div", lambda p, x: mlp(p, x) / len(x), rule=SIZE)
wrong(
    "divided by the size of the batch, and a suspect before",
    "div",
    lambda p, x: (mlp(p, x) + 0 * mlp(p, x).sum(0)) / len(x),
    rule=SIZE,
)
wrong(
    "divided by the number of inputs",
    "div",
    lambda p, x: mlp(p, x) / jnp.ones(len(x)).sum(),
    rule=SIZE,
)
wrong(
    "divided by the sum of a mask", "reduce_sum", lambda p, x: mlp(p, x) / (x != 0).sum(), rule=SIZE
)
wrong(
    "a weight for each position",
    "mul",
    lambda p, x: mlp(p, x) * (1 + jnp.arange(len(x)))[:, None],
    rule=POSITION,
)
wrong("in a jit", "reduce_sum", hidden(jax.jit(standardize)))
wrong("in a remat", "reduce_sum", hidden(jax.checkpoint(standardize)))
wrong(
    "in a cond",
    "reduce_sum",
    hidden(lambda h: lax.cond(h.shape[1] > jnp.zeros(()), standardize, tanh, h)),
)
wrong(
    "in one output of two", "reduce_sum", lambda p, x: {"a": mlp(p, x), "b": standardize(mlp(p, x))}
)
wrong(
    "behind a branch of Python", "reduce_sum", hidden(lambda h: standardize(h) if len(h) > 1 else h)
)
wrong(
    "after a cond",
    "reduce_sum",
    hidden(lambda h: standardize(lax.cond(h.shape[1] > jnp.zeros(()), jnp.sin, tanh, h))),
)
wrong(
    "a weight for each position, from NumPy",
    "mul",
    lambda p, x: mlp(p, x) * (1.0 + np.arange(len(x)))[:, None],
    rule=POSITION,
)
wrong(
    "in jaxprs that do not match",
    "",
    hidden(lambda h: sum(h[i] for i in range(len(h))) + h),
    rule=OTHERS.replace(": {}", ""),
)


@wrong("a scan along the batch", "scan along the batch")
def scanned_batch(p, x):
    return lax.scan(lambda s, h: (s := tanh(s + h), s), jnp.zeros(2, x.dtype), mlp(p, x))[1]


@wrong("an associative scan along the batch", "", rule=OTHERS.replace(": {}", ""))
def associative(p, x):
    return lax.associative_scan(jnp.add, mlp(p, x))


@wrong("in a scan over layers", "reduce_sum", a=(3, 4, 4), c=(4, 2))
def scanned_layers(p, x):
    return lax.scan(lambda h, w: (tanh(standardize(h @ w)), None), x, p["a"])[0] @ p["c"]


@wrong("in a recurrence that begins with zeros", "reduce_sum", x=(4, 2), a=(2, 3), b=(3, 3))
def recurrence(p, x):
    def step(h, x):
        return tanh(standardize(h) @ p["b"] + x @ p["a"]), None

    return lax.scan(step, jnp.zeros((len(x), 3)), x.swapaxes(0, 1))[0]


@wrong("the batch as an axis of space", "conv_general_dilated", a=(3, 3, 4, 2))
def space(p, x):
    return convolve(x[None, :, None], p["a"])[0, :, 0]


@wrong("the batch as channels", "conv_general_dilated", a=(3, 3))
def channels(p, x):
    kernel = jnp.broadcast_to(p["a"][:, :1, None], (3, len(x), len(x)))
    return convolve(tanh(x).T[None], kernel)[0].T


@jax.custom_jvp
def standard_jvp(h):
    return standardize(h)


@jax.custom_vjp
def standard_vjp(h):
    return standardize(h)


standard_jvp.defjvp(lambda h, t: jax.jvp(standardize, h, t))
standard_vjp.defvjp(lambda h: (standardize(h), h), lambda h, g: jax.vjp(standardize, h)[1](g))
wrong("in a custom_jvp", "reduce_sum", hidden(standard_jvp))
wrong("in a custom_vjp", "reduce_sum", hidden(standard_vjp))


def drop(h, key, shape=None):
    return jnp.where(jax.random.bernoulli(key, 0.5, shape or h.shape), h, 0)


wrong(
    "dropout",
    "random_bits",
    lambda p, x: hidden(partial(drop, key=jax.random.key(0)))(p, x),
    rule=RANDOM,
)
wrong(
    "dropout by an old key",
    "random_bits",
    lambda p, x: hidden(partial(drop, key=jax.random.PRNGKey(0)))(p, x),
    rule=RANDOM,
)
wrong(
    "noise for each position",
    "random_bits",
    lambda p, x: hidden(lambda h: h + jax.random.normal(jax.random.key(0), h.shape))(p, x),
    rule=RANDOM,
)


@wrong("a key for each position", "random_bits", rule=RANDOM)
def keys_by_position(p, x):
    return mlp(p, jax.vmap(drop)(x, jax.random.split(jax.random.key(0), len(x))))


class Norm(nn.Module):
    average: bool = False

    @nn.compact
    def __call__(self, x):
        h = nn.BatchNorm(use_running_average=self.average)(nn.Dense(5)(x))
        return nn.Dense(2)(tanh(h))


class Drop(nn.Module):
    deterministic: bool = False

    @nn.compact
    def __call__(self, x):
        h = nn.Dropout(0.3, deterministic=self.deterministic)(tanh(nn.Dense(5)(x)))
        return nn.Dense(2)(h)


def flax_norm():
    x, module = examples((4,))[0], Norm()
    variables = module.init(jax.random.key(0), x)

    def f(p, x):
        return module.apply({**variables, "params": p}, x, mutable=["batch_stats"])[0]

    return Case(
        f, variables["params"], x, OTHERS.format("reduce_sum along the batch, in .*BatchNorm_0")
    )


def flax_drop():
    x, module = examples((4,))[0], Drop()
    params = Drop(True).init(jax.random.key(0), x)

    def f(p, x):
        return module.apply(p, x, rngs={"dropout": jax.random.key(1)})

    return Case(f, params, x, RANDOM.format("random_bits, in .*Dropout_0"))


def key_in_params():
    params = {**weights(MLP), "key": jax.random.key(0)}
    f = lambda p, x: drop(mlp(p, x), p["key"])  # noqa: E731 (a function of one line)
    return Case(f, params, examples((4,))[0], RANDOM.format("random_bits"))


def centered():
    params = weights(MLP)
    return Case(
        center(hidden(standardize), params), params, examples((4,))[0], OTHERS.format("reduce_sum")
    )


def of_type(dtype):
    case = WRONG["batch norm by hand"]()
    params, x = jax.tree.map(lambda a: a.astype(dtype), (case.params, case.x))
    return case._replace(params=params, x=x)


def head_of_zeros():
    case = WRONG["batch norm by hand"]()
    return case._replace(params={**case.params, "c": jnp.zeros((3, 2))})


def over_a_root():
    params = {**weights(MLP), "v": jnp.ones(5)}
    f = lambda p, x: hidden(lambda h: standardize(h) / jnp.sqrt(p["v"]))(p, x)  # noqa: E731 (a function of one line)
    return Case(f, params, examples((4,))[0], OTHERS.format("reduce_sum"))


def equal_examples(n, fill):
    case = WRONG["batch norm by hand"]()
    return case._replace(x=jnp.full((n, 4), fill))


WRONG |= {
    "Flax batch norm in training": flax_norm,
    "Flax dropout that is on": flax_drop,
    "dropout by a key among the parameters": key_in_params,
    "a centered model, zero at its anchor": centered,
    "a parameter under a root": over_a_root,
    "behind a head of zeros": head_of_zeros,
    "in float32": partial(of_type, jnp.float32),
    "in bfloat16": partial(of_type, jnp.bfloat16),
    "on one example": partial(equal_examples, 1, 0.5),
    "on equal examples": partial(equal_examples, 3, 0.0),
}


@each(
    WRONG,
    "batch norm by hand",
    "the largest of the batch",
    "a cumulative sum",
    "examples in order",
    "examples reversed",
    "the next example",
    "the example before, by a pad",
    "examples in another order",
    "the batch as a window",
    "examples that are added into the first",
    "a transposed reshape",
    "a mean by a product",
    "the mean by a collective",
    "divided by the size of the batch",
    "a weight for each position",
    "in a cond",
    "a scan along the batch",
    "in a scan over layers",
    "the batch as channels",
    "in a custom_jvp",
    "dropout",
    "behind a head of zeros",
    "on one example",
)
def test_a_model_that_does_not_treat_examples_alone_is_refused_by_name(name):
    case = WRONG[name]()
    with pytest.raises(ValueError, match=case.says):
        check_examples(case.f, case.params, case.x)


@each(
    WRONG,
    "in a jit",
    "in a remat",
    "in a custom_vjp",
    "a spectrum over the batch",
    "the batch as an axis of space",
    "noise for each position",
    "divided by the number of inputs",
    "in jaxprs that do not match",
)
def test_it_is_refused_under_jit_too(name):
    with pytest.raises(ValueError, match=WRONG[name]().says):
        traced(WRONG[name]())


# --- what is let through


def there_and_back(f, there=lambda x: x[::-1], back=lambda y: y[::-1]):
    """Make a model suspect."""
    return lambda p, x: jax.tree.map(back, f(p, jax.tree.map(there, x)))


def column(p, x):
    return mlp(p, x)[:, 0]


right("a gradient of the sum by x", lambda p, x: jax.grad(lambda x: column(p, x).sum())(x))
right(
    "a gradient of the mean by x, times N",
    lambda p, x: len(x) * jax.grad(lambda x: column(p, x).mean())(x),
)
right(
    "a Jacobian of the batch, summed over zeros",
    lambda p, x: jax.jacrev(partial(column, p))(x).sum(1),
)
right(
    "the diagonal of a Jacobian of the batch",
    lambda p, x: jnp.einsum("nnd->nd", jax.jacfwd(partial(column, p))(x)),
)
right(
    "a Laplacian of the sum by its Hessian",
    lambda p, x: jnp.einsum("ndnd->n", jax.hessian(lambda x: column(p, x).sum())(x))[:, None],
)
right("the diagonal of a product", lambda p, x: jnp.diagonal(mlp(p, x) @ x[:, :2].T)[:, None])
right(
    "entries by numbers",
    lambda p, x: mlp(p, x)[jnp.arange(len(x)), jnp.argmax(x[:, :2], 1)][:, None],
)
right(
    "writes by numbers",
    lambda p, x: (h := mlp(p, x)).at[jnp.arange(len(x)), jnp.argmax(h, 1)].set(0),
)
right(
    "a sum by segments",
    lambda p, x: jax.ops.segment_sum(
        mlp(p, x).reshape(-1), jnp.repeat(jnp.arange(len(x)), 2), len(x)
    ),
)
right(
    "an example at a time, by hand", lambda p, x: jnp.stack([mlp(p, x[i]) for i in range(len(x))])
)
right("a map in batches of two", lambda p, x: lax.map(partial(mlp, p), x, batch_size=2))
right("the first and the others", lambda p, x: jnp.concatenate([mlp(p, x[:1]), mlp(p, x[1:])]))
right(
    "a loop that writes",
    lambda p, x: lax.fori_loop(
        0, len(x), lambda i, y: y.at[i].set(mlp(p, x[i])), jnp.zeros((len(x), 2))
    ),
)
right("reversed and back", there_and_back(mlp))
right(
    "rolled and back",
    there_and_back(mlp, lambda x: jnp.roll(x, 1, 0), lambda y: jnp.roll(y, -1, 0)),
)
right(
    "joined with itself and cut",
    there_and_back(mlp, lambda x: jnp.concatenate([x, x]), lambda y: y[len(y) // 2 :]),
)
right(
    "summed and subtracted",
    lambda p, x: mlp(p, jnp.diff(jnp.cumsum(x, 0), axis=0, prepend=jnp.zeros((1, 4)))),
)
right(
    "ordered and back", lambda p, x: mlp(p, x[(order := jnp.argsort(x[:, 0]))])[jnp.argsort(order)]
)
right(
    "folded behind the time",
    lambda p, x: mlp(p, x.swapaxes(0, 1).reshape(-1, 4)).reshape(3, -1, 2).swapaxes(0, 1),
    (3, 4),
)
right(
    "as a batch of one, padded",
    lambda p, x: convolve(
        jnp.pad(x[None], ((0, 0), (0, 0), (1, 1), (0, 0)), mode="wrap"), p["a"], "VALID"
    )[0],
    (4, 2),
    a=(1, 3, 2, 2),
)
right(
    "as an axis of space that no kernel spans",
    lambda p, x: readout(tanh(convolve(x[None], p["a"]))[0]),
    (4, 2),
    a=(1, 3, 2, 2),
)
right(
    "a kernel for each example",
    lambda p, x: jax.vmap(
        lambda x: convolve(x[None, :, None], tanh(x[:3, None, None] * p["a"]))[0]
    )(x),
    a=(1, 1, 2),
)
right(
    "a branch of Python",
    lambda p, x: mlp(p, x) if len(x) % 2 else jnp.concatenate([mlp(p, x[:1]), mlp(p, x[1:])]),
)
right("no other size than one", lambda p, x: mlp(p, x.reshape(4)[None]))
right("zero times the mean", lambda p, x: mlp(p, x) + 0 * mlp(p, x).mean(0))
right(
    "noise of no size",
    lambda p, x: mlp(p, x) + 0.0 * jax.random.normal(jax.random.key(0), (len(x), 2)),
)
right("the same mask for all", hidden(lambda h: drop(h, jax.random.key(0), (5,))))
right(
    "random features",
    lambda p, x: mlp(p, jnp.cos(x @ jax.random.normal(jax.random.key(0), (4, 4)))),
)
right(
    "a mean over what a mask leaves",
    lambda p, x: (
        jnp.where(x > 0, tanh(x @ p["a"]), 0).sum(1, keepdims=True)
        / (1 + (x > 0).sum(1, keepdims=True))
    ),
    a=(4, 4),
)
right(
    "a normalised weight and a suspect",
    there_and_back(lambda p, x: mlp({k: w / jnp.linalg.norm(w) for k, w in p.items()}, x)),
)
right("no number", there_and_back(lambda p, x: mlp(p, x) * jnp.nan))
right("a callback", lambda p, x: jax.pure_callback(np.tanh, h := mlp(p, x), h))


@right("experts that are sent their examples", a=(4, 3), b=(3, 4, 2))
def experts(p, x):
    chosen = jax.nn.one_hot(jnp.argmax(x @ p["a"], 1), 3)
    slot = jax.nn.one_hot(jnp.cumsum(chosen, 0) * chosen - 1, len(x)) * chosen[..., None]
    sent = jnp.einsum("nd,nec->ecd", x, slot)
    return jnp.einsum("eco,nec->no", jnp.einsum("ecd,edo->eco", sent, p["b"]), slot)


@right("time first", x=(3, 4), a=(4, 4))
def time_first(p, x):
    step = lambda h, x: (tanh(h @ p["a"] + x), h)  # noqa: E731 (a function of one line)
    h, y = lax.scan(step, jnp.zeros((len(x), 4)), x.swapaxes(0, 1))
    return y.swapaxes(0, 1) + h[:, None]


@right("a bound that is the longest of the batch", x={"tokens": 4}, a=(6, 3))
def longest(p, t):
    length = t[:, 0]

    def body(s):
        i, h = s
        return i + 1, jnp.where((i < length)[:, None], tanh(h + p["a"][t[:, 1]]), h)

    return lax.while_loop(lambda s: s[0] < length.max(), body, (0, jnp.zeros((len(t), 3))))[1]


@right("an iteration until all have converged", a=(4, 4))
def until_all(p, x):
    def body(s):
        z, _ = s
        new = tanh(0.5 * z @ p["a"] + x)
        return new, jnp.abs(new - z).max()

    return lax.while_loop(lambda s: s[1] > 1e-4, body, (x, jnp.inf))[0]


def rounded(h, dtype):
    """Give what rounding does that depends on the position and on the size of the batch."""
    digits = jnp.finfo(dtype).eps * (jnp.arange(len(h)) + len(h))
    return h.astype(dtype) * (1 + digits[:, None]).astype(dtype)


@right("rounding that chaos makes large", a=(4, 4))
def chaos(p, x):
    return lax.fori_loop(0, 100, lambda i, h: jnp.sin(4 * rounded(h, jnp.float64) @ p["a"]), x)


@right("a deep model whose rounding is that of bfloat16", a=(4, 4))
def deep_and_coarse(p, x):
    h = lax.fori_loop(0, 4, lambda i, h: tanh(rounded(h, jnp.bfloat16) @ p["a"]), x)
    return h.astype(x.dtype)


@right("a change that is lost in rounding")
def lost(p, x):
    return mlp(p, x) + 0.06 * jnp.arange(len(x))[:, None] + 2e15


def flax(module):
    x = examples((4,))[0]
    variables = module.init(jax.random.key(0), x)
    rest = {k: v for k, v in variables.items() if k != "params"}
    return Case(lambda p, x: module.apply({"params": p, **rest}, x), variables["params"], x)


def key_in_x():
    x = examples((4,))[0]
    f = lambda p, x: jax.vmap(drop)(mlp(p, x["x"]), x["key"])  # noqa: E731 (a function of one line)
    return Case(f, weights(MLP), {"x": x, "key": jax.random.split(jax.random.key(0), len(x))})


def centered_and_suspect():
    params = weights(MLP)
    return Case(center(there_and_back(mlp), params), params, examples((4,))[0])


def the_batch_as_one_example():
    case = WRONG["batch norm by hand"]()
    return case._replace(f=lambda p, x: case.f(p, x[0])[None], x=case.x[None])


def coarse():
    params, x = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (weights(MLP), examples((4,))[0]))
    return Case(there_and_back(mlp), params, x)


RIGHT |= {
    "Flax batch norm in evaluation": partial(flax, Norm(True)),
    "Flax dropout that is off": partial(flax, Drop(True)),
    "dropout by the example's own key": key_in_x,
    "a centered model and a suspect": centered_and_suspect,
    "the whole batch as one example": the_batch_as_one_example,
    "bfloat16 and a suspect": coarse,
}
SUSPECT = ["convolution: of the batch of a batch", "layer norm", "table[tokens]", "a transformer", "GRU", "pytree outputs", "pytree inputs and parameters", "switch on an integer leaf"]  # fmt: skip # to be read as a table
RIGHT |= {
    f"{name}, and a suspect": lambda make=MODELS[name]: there_and_back_of(make())
    for name in SUSPECT
}


def there_and_back_of(case):
    return Case(there_and_back(case.f), case.params, case.x1)


@each(
    RIGHT,
    "a gradient of the sum by x",
    "the diagonal of a product",
    "a loop that writes",
    "reversed and back",
    "as a batch of one, padded",
    "a kernel for each example",
    "zero times the mean",
    "the same mask for all",
    "an iteration until all have converged",
    "rounding that chaos makes large",
    "experts that are sent their examples",
    "no number",
    "pytree outputs, and a suspect",
)
def test_a_model_that_treats_examples_alone_is_let_through(name):
    case = RIGHT[name]()
    check_examples(case.f, case.params, case.x)


@each(
    RIGHT,
    "time first",
    "a bound that is the longest of the batch",
    "rolled and back",
    "a callback",
    "random features",
)
def test_it_is_let_through_under_jit_too(name):
    traced(RIGHT[name]())


CLEAR = ["a gradient of the sum by x", "as a batch of one, padded", "a kernel for each example", "the same mask for all", "random features", "time first", "a bound that is the longest of the batch", "Flax batch norm in evaluation", "Flax dropout that is off", "the whole batch as one example"]  # fmt: skip # to be read as a table


@each(CLEAR, "random features", "a bound that is the longest of the batch")
def test_a_model_without_suspects_needs_no_trial(name, monkeypatch):
    tried = []
    monkeypatch.setattr(trial, "_trial", lambda *a: tried.append(a))
    case = RIGHT[name]()
    check_examples(case.f, case.params, case.x)
    traced(case)
    assert not tried


@each(
    MODELS,
    "einsum over heads",
    "convolution: of the batch of a batch",
    "group norm",
    "a tied decoder",
    "linear attention",
    "scan over layers, reversed",
    "cond on x, under vmap",
    "custom_vjp with a weight",
    "a residual u_t - u_xx, grad of grad",
)
def test_a_model_of_the_table_is_let_through_without_a_trial(name, monkeypatch):
    tried = []
    monkeypatch.setattr(trial, "_trial", lambda *a: tried.append(a))
    case = MODELS[name]()
    traced(Case(case.f, case.params, case.x1))
    assert not tried
    assert trial._passed


# --- where and how often


BATCH_NORM = hidden(standardize)


def test_it_is_refused_under_vmap_and_grad():
    x, params = examples((4,))[0], weights(MLP)
    several = jax.tree.map(lambda w: jnp.stack([w, w]), params)
    check = lambda p: (check_examples(BATCH_NORM, p, x), sum(map(jnp.sum, p.values())))[1]  # noqa: E731 (a function of one line)
    with pytest.raises(ValueError, match="see each other"):
        jax.vmap(check)(several)
    with pytest.raises(ValueError, match="see each other"):
        jax.grad(check)(params)


def test_it_is_refused_where_all_is_known_inside_of_a_jit():
    x, params = examples((4,))[0], weights(MLP)
    with pytest.raises(ValueError, match="see each other"):
        jax.eval_shape(lambda t: (check_examples(BATCH_NORM, params, x), t)[1], 1.0)


def test_a_function_that_closes_over_traced_weights_is_judged_too():
    x, params = examples((4,))[0], weights(MLP)

    def check(a, g):
        check_examples(lambda p, x: g(x @ a) @ p["b"], params, x)
        return a

    jax.eval_shape(partial(check, g=lambda h: tanh(h[::-1])[::-1]), params["a"])
    with pytest.raises(ValueError, match="see each other: reduce_sum"):
        jax.eval_shape(partial(check, g=standardize), params["a"])
    assert not trial._passed  # or it would keep the tracer


def counted(f):
    calls = []
    return calls, lambda p, x: calls.append(len(x)) or f(p, x)


@pytest.mark.parametrize("f", [mlp, there_and_back(mlp)], ids=["clear", "suspect"])
def test_a_model_is_looked_at_once_for_each_shape(f):
    calls, f = counted(f)
    x = examples((4,))[0]
    for scale in (1, 2):
        check_examples(f, jax.tree.map(lambda w, s=scale: s * w, weights(MLP)), x[scale:])
    assert calls == [2, 3]
    check_examples(f, weights(MLP), x.astype(jnp.float32))
    assert calls == [2, 3] * 2


def test_no_more_than_so_many_models_are_remembered(monkeypatch):
    monkeypatch.setattr(trial, "_LIMIT", 3)
    for _ in range(5):
        calls, f = counted(mlp)
        check_examples(f, weights(MLP), examples((4,))[0])
    assert len(trial._passed) == 3
    check_examples(f, weights(MLP), examples((4,))[0])
    assert calls == [2, 3]


def test_a_key_of_the_caller_is_not_used_up():
    case = WRONG["dropout by a key among the parameters"]()
    with pytest.raises(ValueError, match="random_bits"):
        check_examples(case.f, case.params, case.x)
    jax.random.normal(case.params["key"])


def looping(p, x):
    return lax.while_loop(
        lambda s: s[0] < 2, lambda s: (s[0] + 1, standardize(s[1])), (0, mlp(p, x))
    )[1]


def test_a_while_is_run_on_known_values_only():
    case = Case(looping, weights(MLP), examples((4,))[0])
    with pytest.raises(ValueError, match="see each other: reduce_sum"):
        check_examples(*case[:3])
    traced(case)


def test_what_no_parameter_changes_does_not_matter():
    check_examples(lambda p, x: mlp(p, x) + x[:, :2].mean(0), weights(MLP), examples((4,))[0])
