"""A program on several devices that compares lazyjax inside sharded programs with itself outside.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python sharded_programs.py few|some|every

A few ways of one model on one mesh; every model, method and reduction in every way on two meshes of
four devices, not all together; all together, on more devices. The exit status says whether all agree;
what does not is printed.
"""

import itertools
import sys
import traceback
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lazyjax import (
    Dataset,
    linearize,
    natural_gradient,
    ntk,
    ntk_diagonal,
    ntk_operator,
    train,
)
from lazyjax.kernels import METHODS, REDUCTIONS

jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(0)


def normal(*shape):
    return rng.standard_normal(shape)


def conv(w, x):
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def mlp(w, x):
    return jnp.tanh(x @ w[0] + w[1]) @ w[2]


MODELS = {
    "mlp": (mlp, [normal(4, 5), normal(5), normal(5, 3)], normal(16, 4)),
    "scan": (
        lambda w, x: lax.scan(lambda h, a: (jnp.tanh(h @ a), None), x, w[0])[0] @ w[1],
        [normal(2, 4, 4), normal(4, 3)],
        normal(16, 4),
    ),
    "cnn": (
        lambda w, x: jnp.tanh(conv(w[0], x)).mean((1, 2)) @ w[1],
        [normal(3, 3, 2, 4), normal(4, 3)],
        normal(16, 5, 5, 2),
    ),
}


def mesh_of(devices, kind):
    return Mesh(np.array(jax.devices()[:devices]), ("i",), axis_types=(kind,))


def placed(tree, mesh, *axes):
    return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P(*axes))), tree)


def each_share(function, devices, *sharded):
    """Apply a function to the share of every device, one after the other."""
    shares = zip(*(jnp.split(a, devices) for a in sharded), strict=True)
    return jnp.concatenate([function(*share) for share in shares])


def of_kernels(mesh, f, w, x, **options):
    """Ways to a kernel inside a sharded program, and those outside of it."""
    x2 = x[:8]

    def one(w, x):
        return ntk(f, w, x, **options)

    def two(w, x, x2):
        return ntk(f, w, x, x2, **options)

    here, everywhere = placed(x, mesh, "i"), placed((w, x2), mesh)
    specs = [NamedSharding(mesh, spec) for spec in (P(), P("i"), P())]
    shard_map = jax.shard_map(two, mesh=mesh, in_specs=(P(), P("i"), P()), out_specs=P("i"))
    alone = jax.shard_map(one, mesh=mesh, in_specs=(P(), P()), out_specs=P())
    arguments = everywhere[0], here, everywhere[1]
    of_one, of_two = partial(one, w, x), partial(two, w, x, x2)
    yield "placed", lambda: one(w, here), of_one
    yield "all placed", lambda: two(*arguments), of_two
    yield "jit", lambda: jax.jit(one)(w, here), of_one
    yield "jit of examples", lambda: jax.jit(lambda x: one(everywhere[0], x))(here), of_one
    yield "in_shardings", lambda: jax.jit(two, in_shardings=specs)(w, x, x2), of_two
    yield "shard_map", lambda: jax.jit(shard_map)(*arguments), of_two
    yield "shard_map of one", lambda: alone(everywhere[0], placed(x, mesh)), of_one


def of_others(mesh):
    """The tangent model, the operator and training."""
    devices = mesh.devices.size
    f, w, x = MODELS["mlp"]
    moved, y, v = jax.tree.map(lambda a: 1.1 * a, w), normal(16, 3), normal(48)
    X, Y, V, W = *placed((x, y, v), mesh, "i"), placed(w, mesh)

    def tangent(w, x, moved):
        return linearize(f, w)(moved, x)

    def of_a_batch(w, x, moved):
        return linearize(f, w, x)(moved)

    def product(w, x, v):
        return ntk_operator(f, w, x, ridge=0.1) @ v

    def trained(w, x, y, **settings):
        history = train(f, w, Dataset(x, y), optax.sgd(0.05), steps=4, **settings)
        return history.params[0][-1]

    def shares(function, *specs):
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P("i")))

    batches = {"batch_size": 8, "key": jax.random.key(0)}
    for function in (tangent, of_a_batch):
        name, expected = function.__name__, cache(partial(function, w, x, moved))
        yield name, lambda g=function: g(W, X, placed(moved, mesh)), expected
        yield f"{name} jit", lambda g=function: jax.jit(g)(w, X, moved), expected
        inside = shares(function, P(), P("i"), P())
        yield f"{name} shard_map", lambda g=inside: g(W, X, placed(moved, mesh)), expected
    of_all = cache(partial(product, w, x, v))
    of_shares = partial(each_share, partial(product, w), devices, x, v)
    yield "product", lambda: product(W, X, V), of_all
    yield "product jit", lambda: jax.jit(product)(w, X, V), of_all
    yield "product shard_map", lambda: shares(product, P(), P("i"), P("i"))(W, X, V), of_shares
    yield "train", lambda: trained(W, X, Y), lambda: trained(w, x, y)
    yield "train, batches", lambda: trained(w, X, Y, **batches), lambda: trained(w, x, y, **batches)


def of_every_step(mesh):
    """What a step of a training asks of a kernel."""
    f, w, x = MODELS["mlp"]
    weights, r = jnp.arange(1.0, 17.0) / 20, normal(16, 3)
    scales = [1.5, 0.5, normal(5, 3) ** 2 + 0.1]
    turned = jax.tree.map(lambda a: a * (1 + 0.3j), w)
    X, Y, R = placed((x, weights, r), mesh, "i")
    ways = {
        "centred": lambda w, x, v, *_: ntk(f, w, x, center=True, weights=v),
        "metric": lambda w, x, *_: ntk(f, w, x, metric=scales),
        "signs": lambda w, x, *_: ntk(f, w, x, metric="sign", reduce="trace"),
        "diagonal": lambda w, x, *_: ntk_diagonal(f, w, x),
        "between": lambda w, x, v, r, x2: ntk(f, w, x, x2, g=lambda w, x: f(w, x) ** 2),
        "natural gradient": lambda w, x, v, r, x2: natural_gradient(
            f, w, x, r, damping=0.1, center=True, weights=v
        )[0],
    }
    there = placed(w, mesh), X, Y, R, placed(x[:8], mesh)
    for name, way in ways.items():
        expected = cache(partial(way, w, x, weights, r, x[:8]))
        yield name, lambda way=way: way(*there), expected
        yield f"{name} jit", lambda way=way: jax.jit(way)(*there), expected
    for convention in ("real", "hermitian"):
        expected = partial(ntk, f, turned, x, complex=convention)
        yield convention, lambda c=convention: ntk(f, placed(turned, mesh), X, complex=c), expected
    inside = jax.shard_map(
        lambda w, x: ntk_diagonal(f, w, x), mesh=mesh, in_specs=(P(), P("i")), out_specs=P("i")
    )
    yield (
        "diagonal shard_map",
        lambda: jax.jit(inside)(placed(w, mesh), X),
        lambda: ntk_diagonal(f, w, x),
    )


def wrong(name, compute, expected):
    """Tell whether a way does not agree, and print how."""
    try:
        found = np.asarray(compute())
    except Exception:
        print(name)
        traceback.print_exc()
        return True
    expected = np.asarray(expected())
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    if not error < 1e-12:
        print(name, error)
    return not error < 1e-12


def rows_move(mesh, f, w, x):
    """Tell whether rows of a kernel leave the device of their examples.

    That of two batches needs nothing of another device, and that of one stays shared out.
    """
    of_two = placed(w, mesh), placed(x, mesh, "i"), placed(x[:8], mesh)
    program = jax.jit(lambda *arguments: ntk(f, *arguments)).lower(*of_two).compile()
    moves = [
        kind for kind in ("all-gather", "all-reduce", "all-to-all") if kind in program.as_text()
    ]
    program = jax.jit(lambda w, x: ntk(f, w, x)).lower(*of_two[:2]).compile()
    if program.output_shardings.is_fully_replicated and mesh.devices.size > 1:
        moves.append("every row of the kernel of one batch")
    if moves:
        print(mesh, *moves)
    return bool(moves)


FEW = {"placed", "shard_map", "product", "train", "diagonal shard_map"}


def main(how):
    every = list(itertools.product(MODELS, METHODS, REDUCTIONS))
    counts, kinds = (1, 4, 8), (AxisType.Auto, AxisType.Explicit)
    if how == "some":  # every model, method and reduction, not all together
        counts = (4,)
        every = [
            (model, method, list(REDUCTIONS)[(i + j) % len(REDUCTIONS)])
            for (i, model), (j, method) in itertools.product(enumerate(MODELS), enumerate(METHODS))
        ]
    if how == "few":
        counts, kinds, every = (4,), kinds[:1], [("cnn", "structured_derivatives", "trace")]
    failed = 0

    def hold(name, ways):
        for way, *case in ways:
            if how != "few" or way in FEW:
                yield wrong(f"{name}: {way}", *case)

    for devices, kind in itertools.product(counts, kinds):
        mesh = mesh_of(devices, kind)
        for model, method, reduce in every:
            ways = of_kernels(mesh, *MODELS[model], method=method, reduce=reduce)
            failed += sum(hold(f"{mesh} {model} {method} {reduce}", ways))
            if kind == AxisType.Auto and method == "structured_derivatives":
                failed += rows_move(mesh, *MODELS[model])
        failed += sum(hold(f"{mesh}", itertools.chain(of_others(mesh), of_every_step(mesh))))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main(sys.argv[1])
