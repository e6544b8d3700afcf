"""The records of a comparison: what a network, its tangent model and the closed form leave."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np

# by all members
_SHARED = ("x", "y", "grid_x", "steps", "curve_steps", "kernel_steps", "kernel_examples")


@dataclass(frozen=True, kw_only=True)
class Course:
    """The training of one model, members on axis 0.

    Attributes
    ----------
    loss, movement : (E, C)
        At `curve_steps`: the training loss, and norm(w - w0) / norm(w0).
    layer : dict of (E, C)
        The movement of each leaf, by its path.
    diverged_at : (E,)
        The step at which a member diverged; -1 if it did not.
    train, grid : (E, G, N, *out) and (E, G, M, *out)
        Outputs at `steps`, on the training points and on those beside them.
    """

    loss: np.ndarray
    movement: np.ndarray
    layer: dict[str, np.ndarray]
    diverged_at: np.ndarray
    train: np.ndarray
    grid: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ClosedForm:
    """What the closed form says of the tangent model at `steps`, members on axis 0.

    Attributes
    ----------
    loss, movement : (E, G)
    train, grid : (E, G, N, *out) and (E, G, M, *out)
    gap : (E, G)
        Root mean square between tangent model and closed form, on the training points.
    """

    loss: np.ndarray
    movement: np.ndarray
    train: np.ndarray
    grid: np.ndarray
    gap: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Networks, their tangent models and the closed form: E members, the same for all but weights.

    Attributes
    ----------
    x, y, grid_x : (N, ...), (N, *out) and (M, ...)
        The data, and the inputs beside them on which outputs are compared.
    steps, curve_steps, kernel_steps : (G,), (C,) and (P,)
        At which outputs, curves and kernels are recorded.
    kernel_examples : (n,)
        The examples whose kernels are recorded: all, or a sample.
    network, tangent : Course
    closed : ClosedForm, or None where there is none
    gap_train, gap_grid : (E, G)
        Root mean square between network and tangent model.
    kernels : (E, P, n, n)
        Of the network, the mean over the outputs.
    kernel_change, kernel_alignment : (E, P)
        Of each kernel, from and with the first.
    critical_learning_rate : (E,)
        Of gradient descent on the tangent model; NaN where there is no closed form.
    """

    x: np.ndarray
    y: np.ndarray
    grid_x: np.ndarray
    steps: np.ndarray
    curve_steps: np.ndarray
    kernel_steps: np.ndarray
    kernel_examples: np.ndarray
    network: Course
    tangent: Course
    closed: ClosedForm | None
    gap_train: np.ndarray
    gap_grid: np.ndarray
    kernels: np.ndarray
    kernel_change: np.ndarray
    kernel_alignment: np.ndarray
    critical_learning_rate: np.ndarray

    @property
    def members(self) -> int:
        """E."""
        return len(self.network.loss)

    @property
    def closed_form(self) -> ClosedForm:
        """The closed form, of a comparison that has one."""
        if self.closed is None:
            raise ValueError(
                "`closed` must be there, got None: a closed form is known for gradient descent of "
                "one rate on the squared error of the full batch. Train so."
            )
        return self.closed

    @property
    def models(self) -> dict[str, Any]:
        """The courses of those that there are, by name."""
        every = {"network": self.network, "tangent": self.tangent, "closed": self.closed}
        return {name: course for name, course in every.items() if course is not None}

    def of_members(self, which: slice) -> "Comparison":
        """Give some of the members."""
        every = self.arrays().items()
        return Comparison.of({name: a if name in _SHARED else a[which] for name, a in every})

    def scaled(self, factors: np.ndarray) -> "Comparison":
        """Multiply the losses of each member by a factor (E,), and its kernels by 1 over it."""

        def course(own: Any) -> Any:
            return None if own is None else replace(own, loss=own.loss * factors[:, None])

        return replace(
            self,
            network=course(self.network),
            tangent=course(self.tangent),
            closed=course(self.closed),
            kernels=self.kernels / factors[:, None, None, None],
        )

    def arrays(self, prefix: str = "") -> dict[str, np.ndarray]:
        """Give all arrays by names such as `network_loss` and `network_layer/output/bias`."""
        return dict(_named(self, prefix))

    @staticmethod
    def of(arrays: Mapping[str, np.ndarray], prefix: str = "") -> "Comparison":
        """Give the comparison whose arrays have such names; others may be among them."""
        return _read(Comparison, arrays, prefix)


def _named(record: Any, before: str) -> Iterator[tuple[str, np.ndarray]]:
    for own in fields(record):
        value, name = getattr(record, own.name), before + own.name
        if value is None:
            continue
        if is_dataclass(value):
            yield from _named(value, f"{name}_")
        elif isinstance(value, dict):
            yield from ((f"{name}/{leaf}", array) for leaf, array in value.items())
        else:
            yield name, value


def _read(kind: Any, arrays: Mapping[str, np.ndarray], before: str) -> Any:
    def value(name: str, kind: Any) -> Any:
        if kind == ClosedForm | None:
            there = any(key.startswith(f"{name}_") for key in arrays)
            return _read(ClosedForm, arrays, f"{name}_") if there else None
        if is_dataclass(kind):
            return _read(kind, arrays, f"{name}_")
        if kind is np.ndarray:
            return arrays[name]
        leaves = [key for key in arrays if key.startswith(f"{name}/")]
        return {leaf.removeprefix(f"{name}/"): arrays[leaf] for leaf in leaves}

    return kind(**{own.name: value(before + own.name, own.type) for own in fields(kind)})


def join(parts: Sequence[Comparison]) -> Comparison:
    """Put several comparisons on the same data and steps together, members on axis 0."""
    first, *others = (part.arrays() for part in parts)
    return Comparison.of(
        {
            name: array
            if name in _SHARED
            else np.concatenate([array, *(own[name] for own in others)])
            for name, array in first.items()
        }
    )
