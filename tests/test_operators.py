"""Products with a kernel that is never formed are products with the dense one."""

import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from kernel_models import MODELS
from kernel_reference import jacobians
from thoroughness import few

from lazyjax import matrix, ntk
from lazyjax.operators import as_operator, ntk_operator
from lazyjax.operators.algebra import operator
from lazyjax.operators.jacobians import KEEPS

TELLING = "custom_vjp with a weight"
FORWARD_ONLY = {"while_loop"}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def model(params, x):
    """Embedded tokens, a layer used twice (once transposed), a bias, and three outputs."""
    h = params["embedding"][x["tokens"]]
    h = jnp.tanh(jnp.einsum("nsp,pq->nsq", h, params["twice"]) + params["bias"][None, None])
    h = (
        jnp.tanh(jnp.einsum("nsp,qp->nsq", h, params["twice"])).mean(1)
        + x["numbers"] @ params["in"]
    )
    return jnp.tanh(h) @ params["out"] + params["last"][None]


PARAMS = {
    "embedding": normal(0, 11, 8),
    "twice": normal(1, 8, 8),
    "bias": normal(2, 8),
    "in": normal(3, 5, 8),
    "out": normal(4, 8, 3),
    "last": normal(5, 3),
}


def examples(seed, n):
    tokens = jnp.asarray(np.random.default_rng(seed).integers(0, 11, (n, 4)))
    return {"tokens": tokens, "numbers": normal(seed + 1, n, 5)}


X1, X2 = examples(6, 7), examples(8, 5)


@lru_cache
def jacobian():
    """(12, 3, P), of the examples of X1 and of X2."""
    both = jax.tree.map(lambda a, b: np.concatenate([a, b]), X1, X2)
    (leaves,) = jacobians(model, PARAMS, both)
    return np.concatenate([leaf.reshape(12, 3, -1) for leaf in leaves], -1)


def gram(one, two):
    """The kernel (N, M, K, K) of two Jacobians (N, K, P), (M, K, P)."""
    return np.einsum("nkp,mlp->nmkl", one, two)


@lru_cache
def dense(reduce, symmetric):
    J = jacobian()
    kernel = gram(J[:7], J[:7] if symmetric else J[7:])
    if reduce == "none":
        return kernel.transpose(0, 2, 1, 3).reshape(21, -1)
    return np.einsum("nmkl->nm" if reduce == "sum" else "nmkk->nm", kernel) / 3


def close(found, wanted):
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=1e-12 * np.abs(wanted).max())


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("keep", "reduce", "symmetric"),
    [
        ("features", "trace", False),
        ("residuals", "sum", True),
        ("nothing", "trace", False),
        ("nothing", "none", True),
        ("residuals", "none", False),
        ("residuals", "trace", True),
        ("features", "none", True),
    ],
)
def test_products_are_those_of_the_dense_kernel(keep, reduce, symmetric):
    kernel = dense(reduce, symmetric)
    A = ntk_operator(model, PARAMS, X1, None if symmetric else X2, keep=keep, reduce=reduce)
    assert A.shape == kernel.shape
    assert A.psd == symmetric
    block = np.asarray(normal(11, A.shape[1], 5))
    close(A @ block, kernel @ block)
    close(A @ block[:, 0], kernel @ block[:, 0])
    left = np.asarray(normal(12, A.shape[0]))
    close(left @ A, left @ kernel)
    rows = kernel.reshape(7, -1, A.shape[1])[[4, 2]].reshape(-1, A.shape[1])
    close(A.rows(jnp.array([4, 2])), rows)


@few("of_a_network", [False, True])
def test_the_algebra_is_that_of_matrices(of_a_network):
    kernel, other = dense("none", True), dense("none", False)
    if of_a_network:
        A, B = (ntk_operator(model, PARAMS, X1, x2) for x2 in (None, X2))
    else:
        A, B = as_operator(kernel), as_operator(other)
    A = A + 0.5
    eye, v = np.eye(21), np.asarray(normal(10, 21))
    close(A @ v, (kernel + 0.5 * eye) @ v)
    close((2.0 * A / 4.0 + 1.0 - 0.25) @ v, (kernel / 2 + eye) @ v)
    assert (A / 0.5).shift == 1.0
    assert not (-1.0 * A).psd
    close((A @ B) @ v[:15], (kernel + 0.5 * eye) @ other @ v[:15])
    close((A @ B).T @ v, other.T @ (kernel + 0.5 * eye) @ v)
    close(jax.jit(lambda A, v: A @ v)(A, v), (kernel + 0.5 * eye) @ v)
    close(jax.vmap(lambda v: A @ v)(eye), kernel + 0.5 * eye)


def test_an_array_is_an_operator_too():
    J = jacobian()
    A = as_operator(gram(J[:7], J[:7]), ridge=0.5)
    assert A.psd
    assert A.outputs == 3
    v = np.asarray(normal(10, 21))
    close(A @ v, dense("none", True) @ v + 0.5 * v)
    close(A.rows(jnp.array([6, 1])), dense("none", True).reshape(7, 3, 21)[[6, 1]].reshape(6, 21))
    B = as_operator(gram(J[:7], J[7:]))
    assert not B.psd
    close(B.T @ v, dense("none", False).T @ v)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1.0, 1e25])
def test_symmetry_is_seen_at_any_scale(scale):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(6, 9))
    square = features @ features.T
    assert as_operator((scale * square).astype(np.float32)).psd
    assert not as_operator((scale * (square + np.triu(square))).astype(np.float32)).psd


def test_operators_of_half_precision_are_float32():
    square = jnp.asarray([[2.0, 1.0], [1.0 + 1 / 128, 3.0]], jnp.bfloat16)  # to rounding
    A = as_operator(square, ridge=0.5)
    assert A.psd
    assert A.dtype == (A @ jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32
    made = operator(lambda v: v, lambda v: v, shape=(2, 2), dtype=jnp.float16)
    assert (made + 1e-6).shift == jnp.float32(1e-6)
    assert made.dtype == (made @ jnp.ones(2, jnp.float16)).dtype == jnp.float32


@pytest.mark.thorough
@pytest.mark.parametrize("keep", ["features", "residuals"])
def test_outputs_and_wrt_choose_as_in_ntk(keep):
    options = {"outputs": (2, 0), "wrt": lambda path: "twice" in path or "bias" in path}
    A = ntk_operator(model, PARAMS, X1, X2, keep=keep, **options)
    close(A @ normal(10, 10), matrix(ntk(model, PARAMS, X1, X2, **options)) @ normal(10, 10))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("keep", "reduce"), [("residuals", "trace"), ("nothing", "none"), ("features", "trace")]
)
def test_few_vectors_and_outputs_at_a_time_change_nothing(keep, reduce, monkeypatch):
    monkeypatch.setattr("lazyjax.operators.products._VECTORS", 2)
    A = ntk_operator(model, PARAMS, X1, keep=keep, reduce=reduce)
    close(A @ normal(10, A.shape[1], 5), dense(reduce, True) @ normal(10, A.shape[1], 5))


@pytest.mark.thorough
def test_a_budget_is_kept_to_down_to_few_examples_at_once():
    reduce, budgets = "trace", ("10MB", "100kB", "40kB")
    x = jax.tree.map(lambda a: jnp.concatenate([a] * 9), X1)
    kernel = np.asarray(matrix(ntk(model, PARAMS, x, reduce=reduce)))
    kept = []
    for budget in budgets:
        A = ntk_operator(model, PARAMS, x, reduce=reduce, memory=budget)
        close(A @ normal(10, A.shape[1]), kernel @ normal(10, A.shape[1]))
        kept.append(A.product.func.form.setting)
    assert kept[0].keep == "features"
    assert kept[-1].keep == "nothing"
    assert kept[-1].block < 63
    with pytest.raises(ValueError, match=r"`memory` must be at least \d.*KiB .* got '3kB'"):
        ntk_operator(model, PARAMS, x, reduce=reduce, memory="3kB")


ON_DEVICES = """
import jax, numpy as np
jax.config.update("jax_enable_x64", True)
from jax.sharding import Mesh
from test_operators import PARAMS, X1, X2, model, normal
from lazyjax import matrix, ntk
from lazyjax.operators import ntk_operator
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
rows = ("nothing", "none", None), ("residuals", "none", X2), ("features", "trace", X2)
for keep, reduce, x2 in rows:
    kernel = matrix(ntk(model, PARAMS, X1, x2, reduce=reduce))
    A = ntk_operator(model, PARAMS, X1, x2, reduce=reduce, keep=keep, mesh=mesh)
    v = normal(10, A.shape[1], 2)
    assert abs(A @ v - kernel @ v).max() < 1e-12 * abs(kernel).max(), (reduce, keep)
    assert len((A @ v).sharding.device_set) == 4
"""


@pytest.mark.thorough
def test_four_devices_share_out_the_examples():
    flags = {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", ON_DEVICES],
        env={**os.environ, **flags, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.thorough
def test_one_device_is_a_mesh_too():
    mesh = Mesh(np.array(jax.devices()[:1]), ("examples",))
    A = ntk_operator(model, PARAMS, X1, mesh=mesh)
    close(A @ normal(10, 21), dense("none", True) @ normal(10, 21))


@few("name", sorted({*MODELS} - FORWARD_ONLY, key=lambda name: (name != TELLING, name)))
def test_every_kind_of_model_has_its_products(name):
    with jax.numpy_rank_promotion("allow"), jax.debug_key_reuse(False):
        case = MODELS[name]()
        if len(jax.tree.leaves(case.f(case.params, case.x1))) > 1:
            return
        both = jax.tree.map(lambda a, b: np.concatenate([a, b]), case.x1, case.x2)
        (dense,) = jacobians(case.f, case.params, both)
        J = np.concatenate([j.reshape(-1, j.shape[-1]) for j in dense], -1)
        v = np.asarray(normal(0, len(J), 2))
        wanted = J @ (J.T @ v)
        for keep in KEEPS:
            found = ntk_operator(case.f, case.params, both, keep=keep) @ v
            np.testing.assert_allclose(
                found, wanted, atol=1e-11 * max(np.abs(wanted).max(), 1e-30), err_msg=keep
            )


def loop(w, x):
    return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] * w)), (0, x))[
        1
    ]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ntk_operator(model, PARAMS, X1, reduce="diagonal"), ValueError, "`reduce` must be one of none, trace, sum"),
        (lambda: ntk_operator(model, PARAMS, X1, keep="residual"), ValueError, "`keep` must be one of .* Did you mean residuals"),
        (lambda: ntk_operator(model, PARAMS, X1, ridge=-1.0), ValueError, "`ridge` must be 0 or more"),
        (lambda: ntk_operator(model, PARAMS, X1, X2, ridge=1.0), ValueError, "`ridge` must be 0 for the kernel of two batches"),
        (lambda: ntk_operator(lambda p, x: (model(p, x), model(p, x)), PARAMS, X1), TypeError, "`f` must return one array for an operator, got 2"),
        (lambda: ntk_operator(loop, jnp.ones(()), jnp.ones((3, 2))), ValueError, "`f` must have a derivative in reverse mode"),
        (lambda: ntk_operator(3, PARAMS, X1), TypeError, "`f` must be a model function"),
        (lambda: as_operator(jnp.ones((3, 3), int)), TypeError, "`kernel` must hold floats"),
        (lambda: as_operator(jnp.ones((3, 3, 2))), ValueError, "`kernel` must have shape"),
        (lambda: as_operator(jnp.ones((3, 3)), ridge=-1.0), ValueError, "`ridge` must be 0 or more"),
        (lambda: as_operator(jnp.ones((3, 2)), ridge=1.0), ValueError, "`shift` must be added to a square operator"),
        (lambda: as_operator(jnp.eye(3)) @ jnp.ones(4), ValueError, r"`v` must have shape \(3,\) or \(3, B\), got \(4,\)"),
        (lambda: as_operator(jnp.eye(3)) @ jnp.ones((3, 2, 2)), ValueError, r"`v` must have shape"),
        (lambda: as_operator(jnp.eye(3)) @ as_operator(jnp.eye(4)), ValueError, "`other` must have 3 rows"),
        (lambda: as_operator(jnp.eye(3)) + jnp.ones(3), ValueError, "`shift` must be a number"),
        (lambda: as_operator(jnp.eye(3)) * jnp.ones(3), ValueError, "`factor` must be a number"),
        (lambda: as_operator(jnp.eye(3)) / jnp.ones(3), ValueError, "`divisor` must be a number"),
    ],
)  # fmt: skip # to be read as a table
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
