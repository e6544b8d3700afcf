"""The kernel between two functions of the same parameters, against dense Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_reference import quickly
from thoroughness import few

import lazyjax
from lazyjax.kernels import check
from lazyjax.kernels.budgets import pair_within_budget, peak

RNG = np.random.default_rng(0)
SHAPES = {"a": (3, 7), "b": (7,), "c": (7, 5), "d": (5, 2), "e": (2,)}
PARAMS = {name: RNG.normal(size=shape) for name, shape in SHAPES.items()}
X, OTHER = RNG.normal(size=(6, 3)), RNG.normal(size=(4, 3))
SEQUENCE = RNG.normal(size=(4, 8, 3))
TOKENS = RNG.integers(0, 3, (4, 6))


def net(p, x):
    hidden = jnp.tanh(jnp.tanh(x @ p["a"] + p["b"][None]) @ p["c"])
    return hidden @ p["d"] + p["e"][None]


def laplacian(p, x):
    def one(x):
        return jnp.trace(jax.hessian(lambda x: net(p, x[None])[0])(x), axis1=-2, axis2=-1)

    return jax.vmap(one)(x)


def directional(p, x):  # forward over forward: leaves are used three times
    def one(x):
        along = lambda t: net(p, (x + t)[None])[0]  # noqa: E731 (a function of one line)
        first = lambda t: jax.jvp(along, (t,), (jnp.ones(3),))[1]  # noqa: E731 (a function of one line)
        return jax.jvp(first, (jnp.zeros(3),), (jnp.ones(3),))[1]

    return jax.vmap(one)(x)


def gradient(p, x):  # leaves are transposed: outputs (N, 2, 3)
    return jax.vmap(jax.jacrev(lambda x: net(p, x[None])[0]))(x)


def one_output(p, x):
    return net(p, x)[:, :1] ** 2


def squared(p, x):
    return net(p, x) ** 2


def over_positions(p, x):  # (N, T, 3): weights are shared by positions
    h = jnp.tanh(jnp.einsum("ntd,dh->nth", x, p["a"]) + p["b"][None, None])
    return jnp.tanh(h @ p["c"]).mean(1) @ p["d"]


def transposed(p, x):
    return jnp.tanh(net(p, x)[:, :1] * p["b"][None]) @ p["a"].T


def looked_up(p, x):  # tokens (N, T): the leaf is a table
    return jnp.tanh(p["a"][x].mean(1)) @ p["c"]


def also_looked_up(p, x):
    return jnp.tanh(p["a"][x]).sum(1) @ p["c"] @ p["d"]


def sliced(p, x):
    return jnp.tanh(x[:, :2] @ p["a"][:2]) @ p["c"]


def without_some(p, x):
    return jnp.tanh(x @ p["a"])


def a_while(p, x):
    h = jnp.tanh(x @ p["a"] + p["b"][None]) @ p["c"]
    return jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.sin(s[1])), (0, h))[1]


SECONDS = {
    "the same": (net, OTHER),
    "laplacian": (laplacian, OTHER),
    "directional": (directional, OTHER),
    "gradient": (gradient, OTHER),
    "one output": (one_output, OTHER),
    "positions": (over_positions, SEQUENCE),
    "transposed": (transposed, OTHER),
    "table": (looked_up, TOKENS),
    "sliced": (sliced, OTHER),
    "without some": (without_some, OTHER),
    "while": (a_while, OTHER),
}


def jacobians(f, x):
    def columns(p, x):
        return jax.jacfwd(lambda p: f(p, x))(p), f(p, x)

    tree, y = quickly(columns, PARAMS, x)
    return {k: j.reshape(len(y), y[0].size, -1) for k, j in tree.items()}, y.shape[1:]


def expected(f, x1, g, x2):
    (one, out1), (other, out2) = jacobians(f, x1), jacobians(g, x2)
    shape = (len(x1), len(x2), *out1, *out2)
    return {k: np.einsum("nkp,mlp->nmkl", one[k], other[k]).reshape(shape) for k in SHAPES}


def close(found, wanted, scale=None):
    assert found.shape == wanted.shape
    scale = np.max(np.abs(wanted)) if scale is None else scale
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12 * scale)


METHODS = "auto", "jacobian_contraction"
ROWS = [(name, method) for name in SECONDS for method in METHODS]


@few(("name", "method"), sorted(ROWS, key=lambda row: row != ("transposed", "auto")))
def test_the_kernel_is_the_product_of_both_jacobians(name, method):
    g, x2 = SECONDS[name]
    wanted = sum(expected(net, X, g, x2).values())
    close(lazyjax.ntk(net, PARAMS, X, x2, g=g, method=method), wanted)


@few("name", sorted(SECONDS, key=lambda name: name != "sliced"))
def test_the_kernels_of_the_leaves_are_the_products_of_both_jacobians(name):
    g, x2 = SECONDS[name]
    wanted = expected(net, X, g, x2)
    own = lazyjax.ntk(net, PARAMS, X, x2, g=g, per_leaf=True)
    for leaf, kernel in own.items():
        close(kernel, wanted[leaf], np.max(np.abs(sum(wanted.values()))))


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(SECONDS, key=lambda name: name != "gradient"))
def test_the_functions_may_be_turned_round(name):
    g, x2 = SECONDS[name]
    whole = sum(expected(net, X, g, x2).values())
    turned = lazyjax.ntk(g, PARAMS, x2, X, g=net, batch_size=3)
    k = whole.ndim - 2 - 1
    close(turned, np.transpose(whole, (1, 0, *range(3, 3 + k), 2)))


@pytest.mark.thorough
def test_two_tables_of_tokens_meet():
    wanted = sum(expected(looked_up, TOKENS, also_looked_up, TOKENS[:3]).values())
    close(lazyjax.ntk(looked_up, PARAMS, TOKENS, TOKENS[:3], g=also_looked_up), wanted)


@pytest.mark.thorough
@pytest.mark.parametrize("reduce", ["none", "diagonal", "trace", "sum"])
def test_with_itself_it_is_the_kernel_of_one_function(reduce):
    def kernels(p):
        one, other = (lazyjax.ntk(net, p, X, OTHER, g=g, reduce=reduce) for g in (net, None))
        return one, other

    close(*quickly(kernels, PARAMS))


def straight(p, x):
    return jnp.tanh(jnp.tanh(x @ p["s"]) @ p["c"])


def turned(p, x):  # the same sizes, the other way round
    return jnp.tanh(jnp.tanh(x @ p["s"].T) @ p["c"])


def first_rows(p, x):
    return jnp.tanh(x[:, :5] @ p["s"][:5])


def last_rows(p, x):  # the same sizes, other entries
    return jnp.tanh(x[:, :5] @ p["s"][2:])


def first_of_stack(p, x):  # shared axes of a stack, against positions
    return jnp.einsum("nd,kdh->nkh", x, p["s"].reshape(7, 7, 1)).sum(-1)


EQUAL = [straight, turned, first_rows, last_rows, first_of_stack]
TOLD_APART = [(straight, turned), (first_rows, last_rows)]
PAIRS = TOLD_APART + [(f, g) for g in EQUAL for f in EQUAL if (f, g) not in TOLD_APART]


@few(("f", "g"), PAIRS, len(TOLD_APART))
def test_equal_sizes_are_not_equal_entries(f, g):
    p = {"s": RNG.normal(size=(7, 7)), "c": PARAMS["c"]}
    x1, x2 = jnp.asarray(RNG.normal(size=(4, 7))), jnp.asarray(RNG.normal(size=(3, 7)))

    def dense(f, x):
        tree = quickly(jax.jacfwd(f), p, x)
        return np.concatenate([j.reshape(len(x), -1, np.size(p[k])) for k, j in tree.items()], -1)

    wanted = np.einsum("nkp,mlp->nmkl", dense(f, x1), dense(g, x2))
    close(lazyjax.ntk(f, p, x1, x2, g=g), wanted)


SCALES = {name: jnp.asarray(RNG.uniform(0.5, 2, shape)) for name, shape in SHAPES.items()}


SOME = {**SCALES, "a": 2.0, "c": 0.5}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("g", "scales"),
    [(one_output, SOME), *((laplacian, m) for m in (SOME, SCALES, dict.fromkeys(SHAPES, 3.0)))],
)
def test_means_metrics_and_choices_are_those_of_each_side(g, scales):
    weights = np.arange(1.0, 7.0), np.arange(1.0, 5.0)
    one, other = jacobians(net, X)[0], jacobians(g, OTHER)[0]

    def sampled(j, w):
        j = j - np.average(j, axis=0, weights=w)
        return np.sqrt(w)[:, None, None] * j

    wanted = sum(
        np.einsum(
            "nkp,p,mlp->nmkl",
            sampled(one[k], weights[0]),
            np.broadcast_to(scales[k], SHAPES[k]).reshape(-1),
            sampled(other[k], weights[1]),
        )
        for k in "ac"
    )
    found = lazyjax.ntk(
        net,
        PARAMS,
        X,
        OTHER,
        g=g,
        metric=scales,
        center=True,
        weights=weights,
        wrt=lambda path: path in "ac",
    )
    close(found, wanted)


@few("g", [squared, laplacian])
def test_signs_are_those_of_one_side(g):
    signs = lazyjax.ntk(net, PARAMS, X, OTHER, g=g, metric="sign", outputs=[1])
    pair = jacobians(net, X)[0], jacobians(g, OTHER)[0]
    both = [np.concatenate(list(j.values()), -1)[:, 1:] for j in pair]
    close(signs, np.einsum("nkp,mlp->nmkl", both[0], np.sign(both[1])))


def test_complex_functions_meet():
    p = jax.tree.map(lambda w: np.asarray(w) + 0.3j * np.asarray(w)[::-1], PARAMS)

    def derivative(f, x):
        tree = quickly(jax.jacfwd(f, holomorphic=True), p, x)
        return np.concatenate([j.reshape(len(x), 2, -1) for j in tree.values()], -1)

    one, other = derivative(net, X), derivative(squared, OTHER)
    found = lazyjax.ntk(net, p, X, OTHER, g=squared, complex="hermitian")
    close(found, np.einsum("nkp,mlp->nmkl", one, other.conj()))


@few("name", sorted(SECONDS, key=lambda name: name != "without some"))
def test_a_budget_is_kept_to_and_changes_only_rounding(name):
    g, x2 = SECONDS[name]
    x1, x2 = np.concatenate([X] * 7), np.concatenate([x2] * 7)
    one, other = check(net, PARAMS, x1), check(g, PARAMS, x2)
    budget = int(0.7 * peak(one, other))
    fitting = pair_within_budget(one, other, budget)
    assert fitting[0].options.level == fitting[1].options.level > 0
    assert peak(*fitting) <= budget
    found = lazyjax.ntk(net, PARAMS, x1, x2, g=g, memory=budget)
    close(found, np.asarray(lazyjax.ntk(net, PARAMS, x1, x2, g=g)))


@pytest.mark.parametrize(
    ("g", "options", "kind", "text"),
    [
        (net, {"x2": None}, ValueError, "`x2` must be given with `g`"),
        (net, {"memory": 1000}, ValueError, "`memory` must be at least .* got 1000"),
        (net, {"method": "ntk_vector_products"}, ValueError, "`method` must not be ntk_vector"),
        (one_output, {"reduce": "trace"}, ValueError, "`reduce` must be 'none' where f and g"),
        (lambda p, x: (net(p, x), x), {}, TypeError, "`f` must return one array for a kernel"),
        (net, {"weights": jnp.ones(6)}, ValueError, "`weights` must be a pair"),
    ],
)
def test_bad_input_is_refused(g, options, kind, text):
    x2 = options.get("x2", OTHER)
    options = {name: value for name, value in options.items() if name != "x2"}
    with pytest.raises(kind, match=text):
        lazyjax.ntk(net, PARAMS, X, x2, g=g, **options)
