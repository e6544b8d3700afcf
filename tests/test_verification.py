"""`verify` finds a wrong kernel, names the leaf and its rule, and passes every right one."""

from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_models import MODELS, ROUNDED, normal
from thoroughness import few

from lazyjax import WrongKernel, kernel_store, verify
from lazyjax.factors import pair, walk
from lazyjax.kernels import METHODS, REDUCTIONS
from lazyjax.kernels.methods import Method

X = jnp.asarray(normal(1, 5, 4))
P = {
    "w": jnp.asarray(normal(0, 4, 6)),
    "b": jnp.asarray(normal(1, 1, 6)),
    "c": jnp.asarray(normal(2, 6, 3)),
}
TABLE = {"t": jnp.asarray(normal(0, 6, 5)), "c": jnp.asarray(normal(2, 5, 3))}
TOKENS = jnp.asarray([0, 3, 5, 2, 3])


def with_a_factor(p, x):
    return jnp.tanh(x @ p["w"] + 0.1 * p["b"]) @ p["c"]


def lookups(p, i):
    return jnp.tanh(p["t"][::-1][i] + p["t"][(2 * i + 1) % 6]) @ p["c"]


def is_found(f, params, x, *, match, **options):
    """Hold that whatever the random vectors are, the wrong kernel of f is found; give the last record."""
    for seed in range(5):
        with pytest.raises(WrongKernel, match=match) as raised:
            verify(f, params, x, method="structured_derivatives", seed=seed, **options)
    return raised.value.verification


@few("reduce", ["none", "diagonal", "trace", "sum"])
def test_a_bias_that_lost_its_factor_is_found_and_named(reduce):
    right = walk.Bias
    f = lambda p, x: with_a_factor(p, x)  # noqa: E731 (a new function: compiled anew)
    match = r"`b` is off by .* the bias of w \(dot_general at .*rule: as that"
    with patch.object(walk, "Bias", lambda leaf, factor, view: right(leaf, 1.0, view)):
        is_found(f, P, X, match=match, reduce=reduce)


@few("reduce", ["trace", "sum", "diagonal", "none"])
def test_lookups_in_two_orders_are_found_and_named(reduce):
    f = lambda p, x: lookups(p, x)  # noqa: E731 (a function of one line)
    match = r"`t` is off by .* rows by index, 2 times"
    with patch.object(walk, "in_order", lambda roles: True):
        found = is_found(f, TABLE, TOKENS, match=match, reduce=reduce)
    assert found.leaves["t"].error > found.leaves["t"].tolerance
    assert np.isfinite(found.whole.error)


def test_factors_that_overflow_are_found():
    f = lambda p, x: jnp.tanh((1e-25 * x) @ p["w"] * 1e25) @ p["c"]  # noqa: E731 (a function of one line)
    small, x = jax.tree.map(lambda a: a.astype(jnp.float32), (P, X))
    right = pair.scale_of
    with patch.object(pair, "scale_of", lambda a: jnp.ones_like(right(a))):
        is_found(f, small, x, match="`w` is off by")


def test_a_whole_that_is_not_the_sum_of_its_leaves_is_found():
    engine = METHODS["jacobian_contraction"].engine

    def doubled(model, x, task):
        made = engine(model, x, task)
        if task.apart:
            return made
        (contract,) = made.contract.values()
        twice = lambda f1, f2: {i: 2 * k for i, k in contract(f1, f2).items()}  # noqa: E731 (a function of one line)
        return made._replace(contract={"jacobian": twice})

    f = lambda p, x: with_a_factor(p, x)  # noqa: E731 (a function of one line)
    with (
        patch.dict(METHODS, {"jacobian_contraction": Method(doubled, False)}),
        pytest.raises(WrongKernel, match="every leaf right by itself"),
    ):
        verify(f, P, X, method="jacobian_contraction")


DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64]
DTYPE_ROWS = [(d, x2, r) for r in REDUCTIONS for x2 in (None, X[:2] + 1) for d in DTYPES]


@pytest.mark.thorough
@pytest.mark.parametrize(("dtype", "x2", "reduce"), DTYPE_ROWS)
def test_a_right_kernel_passes_in_every_dtype(dtype, x2, reduce):
    # a quarter: where tanh saturates, one unit of bfloat16 moves the kernel by as much as itself
    params, x, other = jax.tree.map(lambda a: (a / 4).astype(dtype), (P, X, x2))
    found = verify(with_a_factor, params, x, other, reduce=reduce, outputs=[2, 0], batch_size=2)
    assert set(found.leaves) == {"w", "b", "c"}
    for check in (found.whole, *found.leaves.values()):
        assert check.error <= check.tolerance
        # a tolerance that lets a wrong factor pass is none
        assert check.tolerance < min(3000 * float(jnp.finfo(dtype).eps), 0.5)


ROWS = [(name, method) for name in MODELS for method in ("auto", *METHODS)]


@few(("name", "method"), sorted(ROWS, key=lambda row: row != ("while_loop", "auto")))
def test_every_row_of_the_table_is_right(name, method):
    with jax.numpy_rank_promotion("allow"), jax.debug_key_reuse(False):
        case = MODELS[name]()
        if name == "while_loop":
            with pytest.raises(ValueError, match="reverse mode"):
                verify(case.f, case.params, case.x1)
            return
        verify(case.f, case.params, case.x1, case.x2, method=method)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ROUNDED)
def test_every_rounded_row_of_the_table_is_right(name):
    with jax.numpy_rank_promotion("allow"), jax.debug_key_reuse(False):
        case = ROUNDED[name]()
        verify(case.f, case.params, case.x1, case.x2)


def test_masks_and_constants_are_those_of_the_kernel():
    found = verify(with_a_factor, {**P, "n": jnp.arange(3)}, X, wrt=lambda path: path in "bn")
    assert set(found.leaves) == {"b"}


def test_what_nothing_depends_on_is_right():
    found = verify(with_a_factor, {**P, "u": jnp.ones(2)}, X, wrt=lambda path: path == "u")
    assert found.whole.error == found.leaves["u"].error == 0


@pytest.mark.thorough
def test_a_store_is_checked_before_the_long_work_unless_it_is_told_not_to(tmp_path):
    wrong = lambda p, x: lookups(p, x)  # noqa: E731 (a function of one line)
    with patch.object(walk, "in_order", lambda roles: True):
        with pytest.raises(WrongKernel, match="`t` is off"):
            kernel_store(wrong, TABLE, TOKENS, path=tmp_path / "k", memory="1GiB")
        assert not (tmp_path / "k").exists()
        kernel_store(wrong, TABLE, TOKENS, path=tmp_path / "k", memory="1GiB", verify=False)
