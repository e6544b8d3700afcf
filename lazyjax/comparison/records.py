"""The records of a comparison: what a network, its tangent model and the closed form leave."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lazyjax.archives import named_arrays, nested
from lazyjax.checkpoints import pack, unpack, write_whole
from lazyjax.types import History, PyTree

# by all members
_SHARED = ("x", "y", "test_x", "test_y", "steps", "curve_steps", "kernel_steps")
_SHARED += ("examples", "kernel_examples", "settings")
_ROUNDING = 4  # epsilons of the outputs, up to which two models are one


def mean_square(difference: np.ndarray) -> np.ndarray:
    """Average over examples and outputs, (E, G, n, *out) -> (E, G)."""
    with np.errstate(over="ignore", invalid="ignore"):  # of what has diverged
        return np.mean(np.square(difference), axis=tuple(range(2, difference.ndim)))


def rms(difference: np.ndarray) -> np.ndarray:
    """Give the root of `mean_square`."""
    return np.sqrt(mean_square(difference))


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
    train, test : (E, G, n, *out) and (E, G, M, *out)
        Outputs at `steps`, on the training points `examples` and on the test points; test is None
        where there are none.
    train_accuracy, test_accuracy : (E, G), or None
        Of a classifier, on the same points.
    """

    loss: np.ndarray
    movement: np.ndarray
    layer: dict[str, np.ndarray]
    diverged_at: np.ndarray
    train: np.ndarray
    test: np.ndarray | None
    train_accuracy: np.ndarray | None = None
    test_accuracy: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class ClosedForm:
    """What the closed form says of the tangent model, members on axis 0.

    Attributes
    ----------
    steps : (T,)
        All `steps` of the comparison; a few where kernel regression by products predicts.
    loss, movement : (E, T)
    train, test : (E, T, n, *out) and (E, T, M, *out)
    gap : (E, T)
        Root mean square between tangent model and closed form, on the training points.
    """

    steps: np.ndarray
    loss: np.ndarray
    movement: np.ndarray
    train: np.ndarray
    test: np.ndarray | None
    gap: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Networks, their tangent models and the closed form: E members, the same for all but weights.

    `plot`, `report`, `save` show it and keep it; `lazyjax.verdicts` says it in a word.

    Attributes
    ----------
    x, y : pytrees of (N, ...)
        The data.
    test_x, test_y : pytrees of (M, ...), or None
        What outputs are compared on beside them, and its targets.
    steps, curve_steps, kernel_steps : (G,), (C,) and (P,)
        At which outputs, curves and kernels are recorded.
    examples, kernel_examples : (n,) and (k,)
        The training examples whose outputs and whose kernels are recorded: all, or a random sample.
    network, tangent : Course
    closed : ClosedForm, or None where there is none
    no_closed_form : str
        Why there is none; empty where there is.
    gap_train, gap_test : (E, G)
        Root mean square between the outputs of network and tangent model.
    disagreement_train, disagreement_test : (E, G), or None
        Of classifiers: the share of the examples that the two put into different classes.
    kernels : (E, P, k, k)
        Of the network, the mean over the outputs.
    kernel_change, kernel_alignment, target_alignment : (E, P)
        Of each kernel: its change from the first, its alignment with the first and with the targets
        (NaN where the targets say nothing example by example).
    sharpness : (E, P)
        Of the network, on the kernel's examples; NaN where it was not measured, as it would have
        cost more than its share.
    pattern_change : (E, P), or None
        The share of ReLU units, of all examples, that changed sides since the start; None for a
        model without ReLUs that can be seen.
    kappa : (E, 2)
        Chizat's relative scale, from below and from above; NaN where it was not computed.
    critical_learning_rate : (E,)
        Of gradient descent on the tangent model; NaN where it was not measured.
    learning_rate, momentum : (E,)
        Of the optimiser, if it is gradient descent with a heavy ball; NaN if not.
    alpha : (E,)
        The output scale that was asked for, or 1. Losses are those of `loss` itself, not over
        alpha^2 as they are trained, and kernels those of f, not times alpha^2.
    epsilon : float
        Of the coarsest floats that the model computes with.
    settings : dict of str
        What was asked for, in words.
    histories : dict of History
        Of the network and of the tangent model; {} where comparisons were joined.
    """

    x: PyTree
    y: PyTree
    test_x: PyTree
    test_y: PyTree
    steps: np.ndarray
    curve_steps: np.ndarray
    kernel_steps: np.ndarray
    examples: np.ndarray
    kernel_examples: np.ndarray
    network: Course
    tangent: Course
    closed: ClosedForm | None
    gap_train: np.ndarray
    gap_test: np.ndarray | None
    disagreement_train: np.ndarray | None
    disagreement_test: np.ndarray | None
    kernels: np.ndarray
    kernel_change: np.ndarray
    kernel_alignment: np.ndarray
    target_alignment: np.ndarray
    sharpness: np.ndarray
    pattern_change: np.ndarray | None
    kappa: np.ndarray
    critical_learning_rate: np.ndarray
    learning_rate: np.ndarray
    momentum: np.ndarray
    alpha: np.ndarray
    epsilon: float
    no_closed_form: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    histories: dict[str, History] = field(default_factory=dict)

    @property
    def members(self) -> int:
        """E."""
        return len(self.network.loss)

    @property
    def examples_in_all(self) -> int:
        """N, of the data."""
        return len(jax.tree.leaves(self.x)[0])

    @property
    def closed_form(self) -> ClosedForm:
        """The closed form, of a comparison that has one."""
        if self.closed is None:
            raise ValueError(
                f"`closed` must be there, got None: {self.no_closed_form}. A closed form is known "
                "for gradient descent of one rate on the squared error of the full batch."
            )
        return self.closed

    @property
    def models(self) -> dict[str, Any]:
        """The courses of those that there are, by name."""
        every = {"network": self.network, "tangent": self.tangent, "closed": self.closed}
        return {name: course for name, course in every.items() if course is not None}

    @property
    def stable(self) -> np.ndarray:
        """Which members (E,) did not diverge, network and tangent model; all if every one did."""
        stable = (self.network.diverged_at < 0) & (self.tangent.diverged_at < 0)
        return stable if np.any(stable) else ~stable

    @property
    def learned(self) -> np.ndarray:
        """What the network learned (E, G): the rms change of its outputs since the start."""
        return rms(self.network.train - self.network.train[:, :1])

    @property
    def share(self) -> np.ndarray:
        """The gap on the training points as a share of what was learned (E, G); 0 if rounding."""
        with np.errstate(all="ignore"):  # nothing is learned at the start
            # a tangent model is the outputs at its anchor and a change: each is rounded
            sizes = rms(self.network.train[:, :1]) + self.learned
            rounding = _ROUNDING * self.epsilon * sizes
            return np.where(self.gap_train > rounding, self.gap_train / self.learned, 0.0)

    @property
    def kernel_velocity(self) -> np.ndarray:
        """How fast the kernel moves (E, P - 1), a step, relative to its size.

        norm(Theta_{i+1} - Theta_i) / (norm(Theta_i) (t_{i+1} - t_i)), between recorded steps (after
        Fort et al. 2020, "Deep learning versus kernel learning", who take the angle).
        """
        with np.errstate(all="ignore"):  # of what has diverged
            moved = np.linalg.norm(np.diff(self.kernels, axis=1), axis=(2, 3))
            size = np.linalg.norm(self.kernels[:, :-1], axis=(2, 3))
            return moved / size / np.diff(self.kernel_steps)

    def numbers(self, member: int = 0) -> dict[str, float]:
        """Give what a member ended with, by name; what was not measured is left out."""
        network, tangent, closed = self.network, self.tangent, self.closed
        ends: dict[str, Any] = {
            "final loss of the network": network.loss,
            "final loss of the tangent model": tangent.loss,
            "final loss in closed form": None if closed is None else closed.loss,
            "accuracy of the network, training points": network.train_accuracy,
            "accuracy of the tangent model, training points": tangent.train_accuracy,
            "accuracy of the network, test points": network.test_accuracy,
            "accuracy of the tangent model, test points": tangent.test_accuracy,
            "classified differently, training points": self.disagreement_train,
            "classified differently, test points": self.disagreement_test,
            "relative weight movement of the network": network.movement,
            "relative weight movement of the tangent model": tangent.movement,
            "gap between network and tangent model, training points": self.gap_train,
            "gap between network and tangent model, test points": self.gap_test,
            "gap as a share of what was learned": self.share,
            "largest gap between tangent model and closed form": None
            if closed is None
            else np.max(closed.gap, axis=1, keepdims=True),
            "relative kernel change": self.kernel_change,
            "kernel alignment": self.kernel_alignment,
            "alignment with the targets at the start": self.target_alignment[:, :1],
            "alignment with the targets": self.target_alignment,
            "kernel velocity, a step": self.kernel_velocity,
            "sharpness at the start": self.sharpness[:, :1],
            "sharpness": self.sharpness,
            "share of ReLU units that changed sides": self.pattern_change,
            "kappa, at least": self.kappa[:, :1],
            "kappa, at most": self.kappa,
            "learning rate": self.learning_rate[:, None],
            "critical learning rate": self.critical_learning_rate[:, None],
        }
        found = {name: float(v[member, -1]) for name, v in ends.items() if v is not None}
        measured = ("accuracy", "alignment with", "sharpness", "kappa", "learning rate", "critical")
        return {k: v for k, v in found.items() if not (np.isnan(v) and k.startswith(measured))}

    def of_members(self, which: slice) -> "Comparison":
        """Give some of the members; the histories stay behind."""
        return _combined([self], lambda arrays: arrays[0][which])

    def arrays(self, prefix: str = "") -> dict[str, np.ndarray]:
        """Give all that is recorded as named arrays, such as `network/loss`, without histories."""
        return named_arrays(_without_histories(self), prefix, _KINDS)

    @staticmethod
    def of(arrays: Mapping[str, np.ndarray], prefix: str = "") -> "Comparison":
        """Give the comparison whose `arrays` these are; others may be among them."""
        return nested(arrays, _KINDS, prefix)

    def save(self, path: str | PathLike[str]) -> None:
        """Save it whole, histories included, to an npz file.

        Raises
        ------
        OSError
            If the folder is missing or cannot be written; the file is then as it was.
        """
        write_whole(path, pack(named_arrays(self, kinds=_KINDS)))

    @staticmethod
    def load(path: str | PathLike[str]) -> "Comparison":
        """Load what `save` wrote; parameters come back as dictionaries, lists and tuples.

        Those of another kind, such as an Equinox module, come back as a dictionary of leaves.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is broken, or holds no comparison.
        """
        loaded = nested(unpack(path), _KINDS)
        if not isinstance(loaded, Comparison):
            raise ValueError(
                f"`path` must hold a comparison, got a file of {type(loaded).__name__}. Pass the "
                "right file."
            )
        return loaded

    def plot(
        self, labels: Sequence[str] | None = None, *, target: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Draw it: figures of Matplotlib by name.

        Parameters
        ----------
        labels : sequence of str, optional
            One a member; none where the members are seeds.
        target : (M,) or (M, 1), optional
            The target on the test points, of a model of one number and one output.

        Returns
        -------
        dict of Figure

        Raises
        ------
        ValueError
            If there is not one label a member.
        """
        from lazyjax.plots import comparison

        return comparison(self, labels, target=target)

    def report(
        self,
        path: str | PathLike[str],
        labels: Sequence[str] | None = None,
        *,
        code: str | None = None,
    ) -> Path:
        """Write one HTML page with the verdict, figures, numbers and settings, that needs no other.

        Parameters
        ----------
        path : path
            Of the page, if it ends in `.html`, or else of a folder, which then holds `index.html`.
        labels : sequence of str, optional
            As in `plot`.
        code : str, optional
            The lines that made it, to be shown; those of the caller by default, where they can be
            read.

        Returns
        -------
        Path
            Of the page.

        Raises
        ------
        OSError
            If it cannot be written.
        ValueError
            As `plot`.
        """
        from lazyjax.pages import comparison_page

        return comparison_page(self, path, labels, code)

    def _repr_html_(self) -> str:
        """Show verdict and small curves in a notebook."""
        from lazyjax.pages import comparison_card

        return comparison_card(self)


_KINDS = (Comparison, Course, ClosedForm, History)


def _without_histories(compared: Comparison) -> Comparison:
    return _combined([compared], lambda arrays: arrays[0])


def _combined(parts: Sequence[Any], of_arrays: Callable[[list[np.ndarray]], np.ndarray]) -> Any:
    """Make one record of several: member by member, what all members share from the first."""

    def value(name: str, own: list[Any]) -> Any:
        if name == "histories":
            return {}
        if any(part is None for part in own):
            return None
        if name in _SHARED or isinstance(own[0], str | float):
            return own[0]
        if is_dataclass(own[0]):
            return _combined(own, of_arrays)
        if isinstance(own[0], dict):
            return {leaf: of_arrays([part[leaf] for part in own]) for leaf in own[0]}
        return of_arrays(own)

    first = parts[0]
    return type(first)(
        **{f.name: value(f.name, [getattr(part, f.name) for part in parts]) for f in fields(first)}
    )


def join(parts: Sequence[Comparison]) -> Comparison:
    """Put several comparisons on the same data and steps together, members on axis 0.

    What one of them lacks, such as a closed form, all lack then.

    Raises
    ------
    ValueError
        If data, test points or recorded steps differ.
    """
    first, *others = parts
    for name in _SHARED:
        if name == "settings":
            continue
        leaves, *more = (jax.tree.leaves(getattr(part, name)) for part in parts)
        if any(
            len(own) != len(leaves) or not all(map(np.array_equal, own, leaves)) for own in more
        ):
            raise ValueError(
                f"`parts` must be of the same data and steps, got some that differ in `{name}`. "
                "Compare on the same points, for as many steps."
            )
    joined = _combined([first, *others], np.concatenate)
    why = next((part.no_closed_form for part in parts if part.closed is None), "")
    return replace(joined, no_closed_form=why)
