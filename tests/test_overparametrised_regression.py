import numpy as np
import pytest

from experiments.overparametrised_regression import Config, conclude, plot, run


@pytest.fixture(scope="module")
def results():
    return run(Config(n=2000, wide_p=300, wide_n=60, steps=300))


@pytest.mark.thorough
def test_exactly_as_many_coordinates_move_as_the_rank(results):
    narrow, wide = results.summary["p = 100, n = 2000"], results.summary["p = 300, n = 60"]
    assert narrow["coordinates that move"] == narrow["rank of X"] == 100
    assert wide["coordinates that move"] == wide["rank of X"] == 60
    assert 0 < wide["largest movement of the others"] < 1e-13
    moved = np.sort(results.arrays["wide/moved"][:, -1])
    assert moved[-60] > 1e-6  # nothing is close to the bound


@pytest.mark.thorough
def test_the_largest_eigenvalue_meets_the_edge_less_the_tracy_widom_shift():
    found = run(Config(steps=1, wide_p=20, wide_n=10)).summary["largest eigenvalue over many draws"]
    assert abs(found["standard errors between mean and law"]) < 3
    assert found["standard error"] < 0.3 * (
        found["Marchenko-Pastur edge"] - found["edge less the Tracy-Widom shift"]
    )  # so that the edge itself is refused
    assert abs(found["mean"] - found["Marchenko-Pastur edge"]) > 3 * found["standard error"]


@pytest.mark.thorough
def test_training_is_the_closed_form(results):
    for name in ("p = 100, n = 2000", "p = 300, n = 60"):
        numbers = results.summary[name]
        assert numbers["largest gap to the closed form over the change of the weights"] < 1e-11
    for name in ("narrow", "wide"):
        np.testing.assert_allclose(
            results.arrays[f"{name}/closed_loss"], results.arrays[f"{name}/loss"], rtol=1e-9
        )


@pytest.mark.thorough
def test_a_step_is_that_of_the_practical(results):
    """w <- w - eta X X^T w + eta X Y: in the eigenbasis the movement is geometric."""
    moved, values = results.arrays["narrow/moved"], results.arrays["narrow/eigenvalues"]
    ratio = moved[:, 300] / moved[:, 1]
    expected = (1 - (1 - 0.001 * values) ** 300) / (0.001 * values)
    np.testing.assert_allclose(ratio, expected, rtol=1e-6)


@pytest.mark.thorough
def test_figures_and_conclusions_are_drawn(results):
    assert set(plot(results)) == {"spectrum", "gram", "training", "coordinates"}
    assert "60 of 300 coordinates move" in conclude(results)[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": 0}, "`p` must be at least 1, got 0"),
        ({"wide_n": -1}, "`wide_n` must be at least 1"),
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"spectra": 1}, "`spectra` must be at least 2, got 1"),
        ({"learning_rate": 0.0}, "`learning_rate` must be positive"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**change)
