"""Kernels within a budget of memory, and what they cost before they are computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from thoroughness import few

from lazyjax import costs
from lazyjax.kernels import METHODS, check, estimate, explain, ntk
from lazyjax.kernels.budgets import peak, within_budget
from lazyjax.kernels.estimates import explanation
from lazyjax.memory import bytes_of


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


PARAMS = {
    "a": normal(0, 12, 40),
    "b": normal(1, 40, 40),
    "bias": normal(2, 1, 40),
    "c": normal(3, 40, 3),
}
X1, X2 = normal(4, 16, 5, 12), normal(5, 11, 5, 12)


def model(params, x):
    """Two hidden layers at five positions, K = 3 outputs."""
    h = jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"] + params["bias"][None])
    return h.mean(1) @ params["c"]


def shallow(params, x):
    return jnp.tanh(x @ params["a"]).mean(1) @ params["c"]


@few(
    ("f", "method", "x2"),
    [
        (shallow, "jacobian_contraction", None),
        (model, "jacobian_contraction", None),
        (model, "structured_derivatives", X2),
    ],
)
def test_a_budget_is_kept_to_and_changes_only_rounding(f, method, x2):
    params = PARAMS if f is model else {name: PARAMS[name] for name in "ac"}
    whole = ntk(f, params, X1, x2, method=method)
    request = check(f, params, X1, x2, method=method)
    free = peak(request)
    levels = set()
    for share in (1.0, 0.6, 0.4):
        try:
            fitted = within_budget(request, int(share * free))
        except ValueError:
            continue
        levels.add(fitted.options.level)
        assert peak(fitted) <= share * free
        found = ntk(f, params, X1, x2, method=method, memory=int(share * free))
        assert found.shape == whole.shape
        np.testing.assert_allclose(found, whole, rtol=1e-11, atol=1e-11 * np.abs(whole).max())
    assert 0 in levels
    assert len(levels) > 1


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("f", "options"), [(shallow, {"method": "jacobian_contraction"}), (model, {})]
)
def test_what_cannot_be_kept_to_is_refused_with_the_least_that_would_do(f, options):
    params = PARAMS if f is model else {name: PARAMS[name] for name in "ac"}
    with pytest.raises(
        ValueError, match=r"`memory` must be at least [0-9.]+KiB .*got 2000"
    ) as refusal:
        ntk(f, params, X1, X2, memory=2000, **options)
    least = str(refusal.value).split("at least ")[1].split(" ")[0]
    assert ntk(f, params, X1, X2, memory=least, **options).shape == (16, 11, 3, 3)


@pytest.mark.thorough
def test_a_budget_works_under_jit():
    found = jax.jit(lambda w, x: ntk(model, w, x, memory="1GiB", reduce="trace"))(PARAMS, X1)
    np.testing.assert_allclose(found, ntk(model, PARAMS, X1, reduce="trace"), rtol=1e-11)


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 * 2**30), ("1.5 MB", 1_500_000), ("4kib", 4096), ("10", 10), (7, 7), (2.5e3, 2500)],
)
def test_amounts_of_memory_are_read(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize(
    ("memory", "error", "message"),
    [
        ("much", ValueError, "`memory` must be an amount like '2GiB'.*got 'much'"),
        ("2 apples", ValueError, "`memory` must be an amount"),
        ("1.2.3GB", ValueError, "`memory` must be an amount"),
        (0, ValueError, "`memory` must be an amount.*positive"),
        (-1.0, ValueError, "`memory` must be an amount"),
        (float("inf"), ValueError, "`memory` must be an amount"),
        (None, TypeError, "`memory` must be an amount like"),
        (True, TypeError, "`memory` must be an amount like"),
    ],
)
def test_what_is_no_amount_of_memory_is_refused(memory, error, message):
    with pytest.raises(error, match=message):
        within_budget(check(model, PARAMS, X1, X2), memory)


@pytest.mark.thorough
def test_the_estimate_of_each_method_is_what_xla_says_of_it_and_its_operations_grow():
    found = estimate(model, PARAMS, X1, X2)
    assert set(found) == set(METHODS)
    for name, one in found.items():
        compiled = (
            jax.jit(lambda w, a, b, name=name: ntk(model, w, a, b, method=name))
            .lower(PARAMS, X1, X2)
            .compile()
            .memory_analysis()
        )
        inputs = compiled.argument_size_in_bytes + compiled.output_size_in_bytes
        assert one.memory == pytest.approx(inputs + compiled.temp_size_in_bytes, rel=0.25)
    twice = estimate(model, PARAMS, jnp.concatenate([X1, X1]), X2)
    assert all(twice[name].operations > found[name].operations for name in METHODS)


def test_a_while_loop_has_an_estimate_for_the_method_in_forward_mode_alone():
    def f(w, x):
        step = lambda s: (s[0] + 1, jnp.tanh(s[1] @ w))  # noqa: E731 (a function of one line)
        return jax.lax.while_loop(lambda s: s[0] < 3, step, (0, x))[1]

    assert set(estimate(f, normal(0, 4, 4), normal(1, 3, 4))) == {"jacobian_contraction"}


def rows_of(f, params, x, **options):
    return {row.name: row for row in explanation(check(f, params, x, **options))}


def test_the_explanation_has_a_row_for_each_leaf_that_says_how_it_enters():
    params = {**PARAMS, "scale": jnp.ones((1, 3)), "unused": jnp.ones(2), "steps": jnp.arange(2)}
    rows = rows_of(lambda p, x: model(p, x) * p["scale"], params, X1)
    assert set(rows) == set(params)
    assert rows["a"].enters == "matrix product, 5 positions"
    assert rows["bias"].enters == "the bias of b"
    assert (rows["scale"].enters, rows["scale"].rule) == ("mul", "plain Jacobian")
    assert (rows["unused"].rule, rows["steps"].rule) == ("zero", "constant")
    assert rows["b"].operations > rows["bias"].operations > rows["unused"].operations == 0


@pytest.mark.parametrize(
    ("method", "rule"),
    [
        ("jacobian_contraction", "plain Jacobian"),
        ("ntk_vector_products", "products, example by example"),
    ],
)
def test_the_explanation_says_what_the_method_makes_of_a_leaf(method, rule):
    rows = rows_of(model, PARAMS, X1, method=method)
    assert {row.rule for row in rows.values()} == {rule}
    for name, row in rows.items():
        assert row.operations == 9 * np.prod(row.shape), name  # each pair of outputs
        assert row.where.startswith("dot_general at "), name


def test_a_weight_of_several_uses_and_of_scanned_layers_is_explained():
    def f(p, x):
        h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["stack"])[0]
        return jnp.tanh(h @ p["tied"]) @ p["tied"].T

    rows = rows_of(f, {"stack": normal(0, 3, 4, 4), "tied": normal(1, 4, 2)}, normal(2, 3, 4))
    assert rows["stack"].enters == "matrix product, 3 in parallel"
    assert rows["tied"].enters == "matrix product, 2 times, 1 of them transposed"


def test_the_table_is_printed_and_says_that_arrays_of_f_are_constants(capsys):
    explain(model, PARAMS, X1)
    assert "constants" not in capsys.readouterr().out
    explain(Partial(lambda mean, p, x: model(p, x - mean), jnp.ones((1, 1, 12))), PARAMS, X1)
    printed = capsys.readouterr().out
    assert "constants (batch statistics" in printed
    assert all(name in printed for name in PARAMS)


WAYS = {
    "a program": lambda: str(jax.make_jaxpr(lambda x: ntk(model, PARAMS, x))(X1)),
    "an estimate": lambda: next(iter(estimate(model, PARAMS, X1, X2))),
}


@few("way", WAYS)
def test_a_changed_table_of_rates_is_seen_for_shapes_that_were_planned_before(way, monkeypatch):
    before = WAYS[way]()
    slow_products = costs.RATES["cpu"]._replace(products=1.0, cache=2**10)
    monkeypatch.setitem(costs.RATES, "cpu", slow_products)
    assert WAYS[way]() != before
    monkeypatch.undo()
    assert WAYS[way]() == before
