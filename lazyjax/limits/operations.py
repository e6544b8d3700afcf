"""The operations of which the limit is known, by primitive."""

from collections.abc import Callable
from typing import Any

from lazyjax.equations import settings
from lazyjax.limits import entrywise, joining, moving, products, sums
from lazyjax.limits.reading import Reader
from lazyjax.limits.values import Value

Operation = Callable[[Reader, Any, list[Value], str], Any]


def _scan(reader: Reader, equation: Any, given: list[Value], where: str) -> list[Value]:
    """Read a scan turn by turn: each has its own slices of stacked weights."""
    scan = settings(equation)
    outside, over = given[: scan.constants], given[scan.constants + scan.carries :]
    carry = given[scan.constants : scan.constants + scan.carries]
    turns = range(scan.length)
    made: list[list[Value]] = []
    for i in reversed(turns) if scan.reverse else turns:
        of_turn = [moving.pick(reader, v, i, where) for v in over]
        out = reader.read(scan.body, [*outside, *carry, *of_turn])
        carry = out[: scan.carries]
        made.append(out[scan.carries :])
    if scan.reverse:
        made.reverse()
    return [
        *carry,
        *(joining.stacked(reader, list(each), 0, where) for each in zip(*made, strict=True)),
    ]


OPERATIONS: dict[str, Operation] = {
    "scan": _scan,
    "repeat": moving.repeat,
    "reshape": moving.reshape,
    "transpose": moving.transpose,
    "squeeze": moving.squeeze,
    "broadcast_in_dim": moving.broadcast,
    "slice": moving.static_slice,
    "split": moving.split,
    "dynamic_slice": moving.dynamic_slice,
    "rev": moving.flip,
    "concatenate": joining.concatenate,
    "stack": joining.stack,
    "pad": moving.pad,
    "convert_element_type": entrywise.same,
    "reduce_precision": entrywise.same,
    "copy": entrywise.same,
    "copy_p": entrywise.same,
    "name": entrywise.same,
    "neg": entrywise.negate,
    "mul": entrywise.multiply,
    "div": entrywise.divide,
    "add": entrywise.add,
    "add_any": entrywise.add,
    "sub": entrywise.subtract,
    "select_n": entrywise.select,
    "reduce_sum": sums.reduce_sum,
    "reduce_window_sum": sums.reduce_window,
    "dot_general": products.dot,
    "conv_general_dilated": products.convolution,
    "gather": products.gather,
}
"""By primitive: what is given back is what it makes, or None, where that is not known here."""
