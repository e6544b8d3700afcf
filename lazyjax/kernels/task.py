"""The kernel of one output array: what is kept of it, and its sizes."""

from typing import NamedTuple

REDUCTIONS = ("none", "diagonal", "trace", "sum")
"""What is kept of the K x K outputs."""

COPIES = {"none": 2, "diagonal": 1, "trace": 0, "sum": 0}
"""How often the shape of the outputs is in that of a kernel."""


WHOLE = -1
"""The key of the kernel of all leaves together, where there may be one of each."""


class Task(NamedTuple):
    """What is asked for, and its sizes."""

    n1: int
    n2: int
    symmetric: bool
    outputs: int  # C
    reduce: str
    apart: bool  # a kernel for each leaf
    passes: int = 1  # tiles that an example is in, of those that are computed one by one
    signs: bool = False  # the derivatives of x2 enter by their signs alone
    orders: tuple[str, ...] = ()  # of each part, where they are settled already

    @property
    def pairs(self) -> int:
        """Entries of the kernel for one pair of examples that are computed."""
        return self.outputs ** (2 if self.reduce == "none" else 1)

    @property
    def rows(self) -> int:
        """Rows that an example has in a product: its outputs, where they are mixed."""
        return self.outputs if self.reduce == "none" else 1

    @property
    def tiles(self) -> float:
        """Pairs of examples that are computed."""
        return self.n1 * self.n2 / (2 if self.symmetric else 1)

    @property
    def examples(self) -> int:
        """Examples whose features are computed."""
        return self.n1 + (0 if self.symmetric else self.n2)
