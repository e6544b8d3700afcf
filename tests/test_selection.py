"""Greedy selections are those of explicit Schur complements and explicit distances."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from kernel_reference import jacobians
from test_operators import PARAMS, model
from test_operators import examples as inputs
from thoroughness import few

from lazyjax import as_operator, ntk, ntk_operator
from lazyjax.equations import equations
from lazyjax.operators import operator
from lazyjax.selection import METHODS, select
from lazyjax.sketches import Sketch

N = 12
X = inputs(20, N)
Z = np.random.default_rng(2).normal(size=(N, 8)) * np.linspace(0.5, 2, N)[:, None]


def schur(kernel, count, given=(), ridge=0.0):
    """MaxDet by the definition: the whole conditional covariance, anew for every choice."""
    noisy = np.asarray(kernel) + ridge * np.eye(len(kernel))
    chosen, scores = list(given), []
    for _ in range(count):
        cross = noisy[:, chosen]
        rest = noisy - cross @ np.linalg.solve(noisy[np.ix_(chosen, chosen)], cross.T)
        variances = np.delete(np.diag(rest), chosen)
        chosen.append(int(np.delete(np.arange(len(noisy)), chosen)[variances.argmax()]))
        scores.append(variances.max())
    return chosen[len(given) :], scores


def farthest(z, count, given=(), ridge=0.0):
    """MaxDist by the definition, from all distances."""
    z = np.asarray(z).reshape(len(z), -1)
    distances = np.square(z[:, None] - z[None]).sum(-1)
    chosen, scores = list(given), []
    for _ in range(count):
        nearest = distances[:, chosen].min(1, initial=np.inf)
        order = nearest if chosen else np.square(z).sum(1)
        order = np.where(np.isin(np.arange(len(z)), chosen), -1, order)
        chosen.append(int(order.argmax()))
        scores.append(nearest[chosen[-1]])
    return chosen[len(given) :], scores


def agrees(found, wanted, rtol=1e-10):
    indices, scores = wanted
    assert found.indices.shape == found.scores.shape == (len(indices),)
    assert found.indices.tolist() == [int(i) for i in indices]
    np.testing.assert_allclose(found.scores, scores, rtol=rtol)


@few("given, ridge", [((3,), 10.0), ((), 0.0), ((), 10.0), ((7, 0, 3), 0.0)])
def test_pivoted_cholesky_takes_the_largest_of_the_schur_complements(given, ridge):
    wanted = schur(Z @ Z.T, 5, given, ridge)
    agrees(select(5, kernel=Z @ Z.T, given=given, ridge=ridge), wanted)
    agrees(select(5, features=Z, given=given, ridge=ridge), wanted)
    assert set(wanted[0]).isdisjoint(given)


@few("given", [(7, 0, 3), (), (3,)])
def test_max_distance_takes_the_farthest_from_the_nearest(given):
    wanted = farthest(Z, 6, given)
    agrees(select(6, kernel=Z @ Z.T, given=given, method="max_distance"), wanted)
    agrees(select(6, features=Z, given=given, method="max_distance"), wanted)
    assert math.isinf(wanted[1][0]) == (not given)


def test_the_references_differ_so_that_no_method_passes_for_the_other():
    assert len({tuple(schur(Z @ Z.T, 5)[0]), tuple(farthest(Z, 5)[0]), tuple(range(5))}) == 3
    assert schur(Z @ Z.T, 5)[0] != schur(Z @ Z.T, 5, ridge=10.0)[0]


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
def test_kernel_operator_and_features_of_a_network_choose_alike(method):
    """With K = 3 outputs: the trace kernel, as `ntk` has it."""
    kernel = ntk(model, PARAMS, X, reduce="trace")
    leaves = jax.tree.leaves(jacobians(model, PARAMS, X))
    z = jnp.concatenate([j.reshape(N, 3, -1) for j in leaves], -1)
    base = ntk_operator(model, PARAMS, X, reduce="trace")
    blind = operator(base.product, base.product, shape=base.shape, dtype=base.dtype, psd=True)
    options = {"method": method, "given": [4]}
    wanted = select(5, kernel=kernel, **options)
    if method == "pivoted_cholesky":
        agrees(wanted, schur(kernel, 5, [4]), rtol=1e-8)
    else:
        agrees(wanted, farthest(z / 3**0.5, 5, [4]), rtol=1e-8)
    for found in (
        select(5, features=z, **options),
        select(5, features=z[:, :, None], **options),
        select(5, features=Sketch(z, 0.0, 0.0), **options),
        select(5, kernel=as_operator(kernel), **options),
        select(5, kernel=base, **options),
        select(5, kernel=blind, **options),
    ):
        agrees(found, wanted, rtol=1e-8)


@pytest.mark.thorough
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_scale_and_the_shift_of_an_operator_count(method, rows):
    base = as_operator(Z @ Z.T)
    if not rows:
        base = operator(base.product, base.product, shape=(N, N), dtype=base.dtype, psd=True)
    found = select(5, kernel=3 * base + 2.0, method=method)
    agrees(found, select(5, kernel=3 * Z @ Z.T + 2 * jnp.eye(N), method=method))
    if method == "pivoted_cholesky":
        agrees(select(5, kernel=3 * base + 1.5, ridge=0.5), found)
        agrees(select(5, kernel=3 * base, ridge=2.0), found)


@few("given, ridge", [((1, 8), 0.7), ((), 0.0), ((), 0.7)])
def test_the_product_of_the_variances_is_the_determinant(given, ridge):
    kernel = np.asarray(Z @ Z.T) + ridge * np.eye(N)
    found = select(5, features=Z, given=given, ridge=ridge)
    assert np.all(np.diff(found.scores) <= 0)
    every = [*given, *found.indices.tolist()]
    both, known = (np.linalg.det(kernel[np.ix_(e, e)]) for e in (every, list(given)))
    assert float(jnp.prod(found.scores)) == pytest.approx(both / known, rel=1e-10)


@few("seed", range(8))
def test_max_distance_covers_within_twice_the_least_radius(seed):
    """Gonzalez 1985, against all sets of as many centres; clusters of unlike sizes and numbers."""
    random = np.random.default_rng(seed)
    z = random.normal(size=(4, 2))[random.permutation([0] * 7 + [1, 2, 3])] * 10
    z = z + random.normal(size=z.shape)
    distances = np.linalg.norm(z[:, None] - z[None], axis=-1)

    def radius(centres):
        return distances[:, list(centres)].min(1).max()

    least = min(map(radius, itertools.combinations(range(len(z)), 4)))
    found = select(5, features=z, method="max_distance")
    assert radius(found.indices[:4].tolist()) <= 2 * least
    assert found.scores[4] == pytest.approx(radius(found.indices[:4].tolist()) ** 2)


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
def test_ties_go_to_the_lowest_number(method):
    assert select(3, kernel=jnp.eye(6), method=method).indices.tolist() == [0, 1, 2]
    assert select(3, features=jnp.eye(6), method=method, given=[1]).indices.tolist() == [0, 2, 3]
    twice = jnp.concatenate([Z, Z])
    found = select(5, features=twice, method=method)
    agrees(found, select(5, features=Z, method=method))


@pytest.mark.thorough
@pytest.mark.parametrize("which", ["kernel", "features"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_exhausted_is_said_and_shown_and_nothing_comes_twice(method, which):
    """Four different examples, each three times over but for the last digit."""
    random = np.random.default_rng(1)
    last = 1 + 2.0**-23 * random.integers(-1, 2, size=(12, 3000))
    z = (np.tile(random.normal(size=(4, 3000)), (3, 1)) * last).astype(np.float32)
    options = {which: jnp.asarray(z @ z.T if which == "kernel" else z), "method": method}
    with pytest.warns(UserWarning, match="after 4 examples of 9 no .* is above rounding") as caught:
        found = select(9, **options)
    assert caught[0].filename == __file__
    assert found.scores.dtype == np.float32
    assert np.all(found.scores[:4] > 100)
    assert not np.any(found.scores[4:])
    first = found.indices[:4].tolist()
    rest = [i for i in range(12) if i not in first]
    assert found.indices[4:].tolist() == rest[:5]
    with pytest.warns(UserWarning, match="after 2 examples of 3"):
        found = select(3, **options, given=[4, 1])
    assert sorted(i % 4 for i in found.indices[:2].tolist()) == [2, 3]
    choose = jax.jit(lambda z: select(9, **{which: z}, method=method))
    under_jit = choose(options[which])
    assert under_jit.indices.tolist() == first + rest[:5]


@pytest.mark.thorough
def test_the_rank_of_a_kernel_in_single_precision_is_seen():
    """A factor of many columns, whose sums have the rounding of the dtype."""
    random = np.random.default_rng(2)
    for rank, spread in ((5, 0), (5, 2), (60, 0), (60, 1)):
        factor = random.normal(size=(300, rank)) * 10.0 ** (-spread * np.arange(rank) / rank)
        z = (factor @ random.normal(size=(rank, 2000))).astype(np.float32)
        for options in ({"features": z}, {"kernel": z @ z.T}):
            with pytest.warns(UserWarning, match=f"after {rank} examples of {rank + 3}"):
                select(rank + 3, **options)
            assert np.all(select(rank, **options).scores > 0)


@pytest.mark.thorough
def test_the_rank_of_half_precision_is_seen():
    """A kernel has lost what its entries have, features only the square of that."""
    z = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.35, -0.7], [-0.9, 0.3]])
    with pytest.warns(UserWarning, match="after 2 examples of 4"):
        select(4, kernel=(z @ z.T).astype(jnp.bfloat16))
    found = select(2, features=jnp.array([[1.0, 0.0], [1.0, 0.125]], jnp.bfloat16))
    agrees(found, ([1, 0], [65 / 64, 1 / 65]), rtol=1e-5)


def test_noise_is_never_exhausted():
    same = jnp.ones((6, 2))
    found = select(6, features=same, ridge=0.5)
    assert sorted(found.indices.tolist()) == list(range(6))
    np.testing.assert_allclose(found.scores, [0.5 + 2 / (1 + 4 * k) for k in range(6)])


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
def test_it_runs_under_jit_and_vmap(method):
    kernels = jnp.stack([Z @ Z.T, (Z @ Z.T)[::-1, ::-1]])
    choose = partial(select, 4, method=method)
    given = jnp.array([[2], [5]])
    every = jax.jit(jax.vmap(lambda k, g: choose(kernel=k, given=g)))(kernels, given)
    features = jax.vmap(lambda z, g: choose(features=z, given=g))(jnp.stack([Z, Z[::-1]]), given)
    through = jax.jit(lambda A, g: choose(kernel=A, given=g))
    for i in range(2):
        wanted = choose(kernel=kernels[i], given=given[i])
        assert every.indices.shape == (2, 4)
        agrees(jax.tree.map(lambda a, i=i: a[i], every), wanted)
        agrees(jax.tree.map(lambda a, i=i: a[i], features), wanted)
        agrees(through(as_operator(kernels[i]), given[i]), wanted)


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
def test_it_runs_in_sharded_programs(method):
    """What differs from device to device, and explicit axes, have types even on one device."""
    choose = partial(select, 4, method=method)
    wanted = choose(features=Z)
    mesh, explicit = (
        jax.make_mesh((1,), ("i",), axis_types=(kind,))
        for kind in (AxisType.Auto, AxisType.Explicit)
    )
    shard = {"mesh": mesh, "in_specs": PartitionSpec("i"), "out_specs": PartitionSpec("i")}
    agrees(jax.jit(jax.shard_map(lambda z: choose(features=z), **shard))(Z), wanted)
    agrees(jax.jit(jax.shard_map(lambda z: choose(kernel=z @ z.T), **shard))(Z), wanted)
    there = jax.device_put(Z, NamedSharding(explicit, PartitionSpec("i")))
    agrees(choose(features=there), wanted)
    agrees(jax.jit(lambda z: choose(features=z))(there), wanted)


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
def test_one_that_is_given_twice_under_jit_counts_once(method):
    choose = jax.jit(lambda given: select(4, features=Z, method=method, given=given))
    agrees(choose(jnp.array([5, 2, 5])), select(4, features=Z, method=method, given=[5, 2]))


@pytest.mark.parametrize("method", METHODS)
def test_no_square_matrix_is_formed_of_features_or_operators(method):
    n, z = 200, jnp.ones((200, 7))  # the diagonal comes from 64 rows at once

    def product(v):
        return z @ (z.T @ v)

    blind = operator(product, product, shape=(n, n), dtype=z.dtype, psd=True)
    for options in ({"features": z}, {"kernel": blind}):
        traced = jax.make_jaxpr(lambda o=options: select(3, **o, method=method))()
        every = [v.aval for e in equations(traced) for v in (*e.invars, *e.outvars)]
        assert (n, 7) in [a.shape for a in every], list(options)
        assert max(a.size for a in every) < n * n, list(options)


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_chosen_by_in_single_precision(method):
    z = Z.astype(jnp.bfloat16)
    found = select(4, features=z, method=method)
    assert found.scores.dtype == np.float32
    wanted = select(4, features=z.astype(jnp.float64), method=method)
    agrees(found, wanted, rtol=1e-4)
    kernel = (z.astype(jnp.float32) @ z.astype(jnp.float32).T).astype(jnp.bfloat16)
    assert select(2, kernel=kernel, method=method).scores.dtype == np.float32


@few("method", METHODS)
def test_features_of_any_scale_choose_alike(method):
    wanted = select(4, features=Z, method=method)
    for scale in (2.0**-600, 2.0**600):  # squares are beyond the range
        found = select(4, features=scale * Z, method=method)
        assert found.indices.tolist() == wanted.indices.tolist()
    found = select(4, features=2.0**-100 * Z, method=method)
    np.testing.assert_allclose(found.scores * 2.0**200, wanted.scores, rtol=1e-12)


@pytest.mark.thorough
def test_small_distances_of_features_do_not_cancel():
    z = 1e4 + jnp.array([[0.0], [1e-5], [3e-5]])
    found = select(2, features=z, given=[0], method="max_distance")
    agrees(found, ([2, 1], [9e-10, 1e-10]), rtol=1e-6)
    z = 1 + jnp.array([[0.0], [1e-3], [3e-3]])  # nor are those of a kernel taken for rounding
    found = select(2, kernel=z @ z.T, given=[0], method="max_distance")
    agrees(found, ([2, 1], [9e-6, 1e-6]), rtol=1e-6)


def test_a_kernel_of_less_precision_than_its_dtype_is_not_refused():
    kernel = (Z @ Z.T).astype(jnp.float16).astype(jnp.float64)
    assert select(N, kernel=kernel, ridge=0.01).indices.shape == (N,)


NAN = np.where(np.arange(9).reshape(3, 3) == 1, np.nan, np.eye(3))
SKEW = Z[:8]  # (8, 8), as features of as many entries as examples are


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "`kernel` or `features` must be given, got none"),
        ({"kernel": np.eye(3), "features": np.eye(3)}, ValueError, "`kernel` or `features` must be given, got both"),
        ({"kernel": Z}, ValueError, r"`kernel` must have shape \(N, N\), got \(12, 8\). Use features="),
        ({"kernel": SKEW}, ValueError, "`kernel` must be symmetric .* features= for features"),
        ({"kernel": np.zeros((3, 3, 2, 2))}, ValueError, r'`kernel` must have shape \(N, N\), .* Use ntk\(..., reduce="trace"\)'),
        ({"kernel": as_operator(np.zeros((3, 3, 2, 2)))}, ValueError, '`kernel` must have one row an example, got 2 .* reduce="trace"'),
        ({"kernel": as_operator(np.ones((3, 2)))}, ValueError, "`kernel` must be symmetric and positive semi-definite"),
        ({"kernel": -np.eye(3)}, ValueError, "`kernel` must be 0 or more, .* whose diagonal is 0 or more"),
        ({"kernel": np.array([[1.0, 2.0], [2.0, 1.0]])}, ValueError, "`kernel` must be positive semi-definite, got a conditional variance of -3"),
        ({"kernel": np.array([[1.0, 2.0], [2.0, 1.0]]), "method": "max_distance"}, ValueError, "`kernel` must be positive semi-definite, got a squared distance of -2"),
        ({"kernel": NAN}, ValueError, "`kernel` must be finite, got 1 values"),
        ({"kernel": np.eye(3, dtype=int)}, TypeError, "`kernel` must hold floats"),
        ({"kernel": Sketch(Z, 0.0, 0.0)}, TypeError, "`kernel` must be an array or a KernelOperator, got a Sketch. Pass features="),
        ({"features": as_operator(np.eye(3))}, TypeError, "`features` must be an array, got a KernelOperator. Pass kernel="),
        ({"features": Z[:, 0]}, ValueError, r"`features` must have shape \(N, \*out, D\), got \(12,\)"),
        ({"features": NAN}, ValueError, "`features` must be finite"),
        ({"features": np.eye(3, dtype=int)}, TypeError, "`features` must hold floats"),
        ({"count": 0}, ValueError, "`count` must be at least 1, got 0"),
        ({"count": 2.5}, TypeError, "`count` must be a whole number"),
        ({"count": 13, "features": Z}, ValueError, "`count` must be at most 12, .* got 13"),
        ({"count": 11, "features": Z, "given": [0, 1]}, ValueError, "`count` must be at most 10, .* got 11"),
        ({"features": Z, "method": "max_dist"}, ValueError, "`method` must be one of pivoted_cholesky, max_distance, got 'max_dist'. Did you mean max_distance"),
        ({"features": Z, "given": [True, False]}, TypeError, "`given` must hold whole numbers .* jnp.flatnonzero"),
        ({"features": Z, "given": 3}, TypeError, r"`given` must hold whole numbers \(g,\), got int64 of shape \(\)"),
        ({"features": Z, "given": [0.5]}, TypeError, "`given` must hold whole numbers"),
        ({"features": Z, "given": [12]}, ValueError, "`given` must be in 0 to 11, got 12 to 12"),
        ({"features": Z, "given": [-1]}, ValueError, "`given` must be in 0 to 11, got -1 to -1"),
        ({"features": Z, "given": [4, 4]}, ValueError, "`given` must name each example once, got 2 numbers of 1 examples"),
        ({"features": Z, "ridge": -1.0}, ValueError, "`ridge` must be 0 or more"),
        ({"features": Z, "ridge": np.ones(12)}, ValueError, r"`ridge` must be a number, got shape \(12,\)"),
        ({"features": Z, "ridge": 1.0, "method": "max_distance"}, ValueError, "`ridge` must be 0 for max_distance"),
    ],
)  # fmt: skip # to be read as a table
def test_bad_input_is_refused(options, error, message):
    options = {"count": 2} | options
    with pytest.raises(error, match=message):
        select(**options)
