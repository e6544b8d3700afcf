import numpy as np
import pytest

from experiments.width_sweep import Config, conclude, plot, run


@pytest.fixture(scope="module")
def results():
    return run(Config(widths=(8, 512), steps=2000))


@pytest.mark.thorough
def test_the_wider_network_is_the_lazier(results):
    thin, wide = results.summary["width 8"], results.summary["width 512"]
    for name in (
        "relative weight movement of the network",
        "relative kernel change",
        "gap as a share of what was learned",
    ):
        assert wide[name] < thin[name] / 3


@pytest.mark.thorough
def test_the_closed_form_predicts_the_tangent_models(results):
    for numbers in results.summary.values():
        assert numbers["largest gap between tangent model and closed form"] < 1e-11


@pytest.mark.thorough
def test_figures_and_conclusions_tell_every_width(results):
    shared = {"functions", "training", "layers", "kernels", "measures"}
    assert set(plot(results)) == shared | {"laziness"}
    assert [s.split(":")[0] for s in conclude(results)] == ["width 8", "width 512"]
    assert np.all(np.isfinite(results.arrays["network/loss"]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"widths": ()}, ValueError, "number of `widths.* must be at least 1"),
        ({"widths": (5, 0)}, ValueError, "`widths` must be at least 1, got 0"),
        ({"learning_rate": -1.0}, ValueError, "`learning_rate` must be positive"),
        ({"steps": 0}, ValueError, "`steps` must be at least 1, got 0"),
        ({"n": 0}, ValueError, "`n` must be at least 1"),
        ({"target": "midle"}, ValueError, "Did you mean middle"),
    ],
)
def test_bad_settings_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        Config(**change)
