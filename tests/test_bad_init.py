import pytest

from experiments.bad_init import CASES, Config, conclude, plot, run

GAP = "gap between network and tangent model, training points"


@pytest.fixture(scope="module")
def results():
    return run(Config(networks=3, steps=200))


@pytest.mark.thorough
def test_the_control_is_lazy_and_the_bad_weights_are_not(results):
    gaps = {name: results.summary[label][GAP]["median"] for name, (label, _) in CASES.items()}
    assert gaps["control"] < 1e-3
    assert gaps["before"] > 100 * gaps["control"]
    assert gaps["after"] > 100 * gaps["control"]
    kernel = {
        name: results.summary[label]["relative kernel change"]["median"]
        for name, (label, _) in CASES.items()
    }
    assert kernel["after"] > 100 * kernel["control"]


@pytest.mark.thorough
def test_all_anchors_meet_their_closed_form(results):
    for label, _ in CASES.values():
        numbers = results.summary[label]
        scale = max(1.0, numbers[GAP]["most"])
        most = numbers["largest gap between tangent model and closed form"]["most"]
        assert most < 1e-7 * scale


@pytest.mark.thorough
def test_figures_and_conclusions_are_drawn(results):
    figures = plot(results)
    shared = ("functions", "training", "layers", "kernels", "measures")
    assert set(figures) == {"gaps"} | {f"{kind}_{name}" for kind in shared for name in CASES}
    assert len(conclude(results)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bad_steps": 0}, "`bad_steps` must be at least 1, got 0"),
        ({"bad_learning_rate": 0.0}, "`bad_learning_rate` must be positive"),
        ({"networks": 0}, "`networks` must be at least 1"),
        ({"width": -3}, "`width` must be at least 1, got -3"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**change)
