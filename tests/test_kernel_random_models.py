"""The kernel of a model that nobody thought of is that of its dense Jacobian."""

from typing import NamedTuple

import jax
import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st
from kernel_reference import check_leaves, check_whole, jacobians, leaf_kernels, quickly, reduced
from random_models import build, nets

from lazyjax.kernels import METHODS, REDUCTIONS, ntk


class Call(NamedTuple):
    method: str
    reduce: str
    per_leaf: bool
    two_batches: bool  # x2 is given
    two_outputs: bool  # `outputs` is: the last and the first
    batch_size: int | tuple[int, int] | None


CALLS = st.builds(
    Call,
    st.sampled_from([*["structured_derivatives"] * 4, *list(METHODS)[1:], "auto"]),
    st.sampled_from(REDUCTIONS),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 2, (2, 1)]),
)


@given(nets(), CALLS)
def test_the_kernel_of_a_random_model_is_that_of_its_dense_jacobian(net, call):
    with jax.numpy_rank_promotion("allow"):
        f, params, x1, x2 = build(net)
        (j,) = jacobians(f, params, np.concatenate([x1, x2]))
        outputs = None
        if call.two_outputs:
            j = [leaf.reshape(5, -1, leaf.shape[-1]) for leaf in j]
            outputs = sorted({j[0].shape[1] - 1, 0}, reverse=True)
            j = [leaf[:, outputs] for leaf in j]
        j1 = [leaf[:3] for leaf in j]
        j2 = [leaf[3:] for leaf in j] if call.two_batches else j1
        (leaves,) = leaf_kernels([j1], [j2])
        expected = [[reduced(leaf, call.reduce) for leaf in leaves]]
        assume(np.any(sum(expected[0])))

        def kernel(params, x1, x2):
            return ntk(
                f,
                params,
                x1,
                x2,
                reduce=call.reduce,
                method=call.method,
                per_leaf=call.per_leaf,
                outputs=outputs,
                batch_size=call.batch_size,
            )

        found = quickly(kernel, params, x1, x2 if call.two_batches else None)
        if call.per_leaf:
            check_leaves(found, expected)
        else:
            check_whole(found, expected)
