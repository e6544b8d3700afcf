import jax
import numpy as np
import pytest

from experiments.wide_limit import (
    NETWORKS,
    VARIANCES,
    Config,
    circle,
    conclude,
    initial_weights,
    kernels,
    limit,
    plot,
    run,
    slope,
    variance,
)
from lazyjax.leaves import path_of

SMALL = {
    "n": 12,
    "parametrizations": ("ntk",),
    "shallow_widths": (16, 128, 1024),
    "deep_widths": (16, 64),
    "seeds": 6,
    "steps": 20,
}


@pytest.fixture(scope="module")
def results():
    return run(Config(**SMALL))


@pytest.mark.thorough
def test_the_limit_on_the_circle_knows_the_angle_alone():
    x = circle(Config(n=12)).x
    kernel = limit(NETWORKS["deep"](16, parametrization="ntk"), x)
    assert kernel.shape == (12, 12)
    turned = np.stack([np.roll(kernel[0], i) for i in range(12)])
    np.testing.assert_allclose(kernel, turned, rtol=1e-12)
    np.testing.assert_allclose(kernel[0, 1:], kernel[0, :0:-1], rtol=1e-12)


@pytest.mark.thorough
@pytest.mark.parametrize("parametrization", sorted(VARIANCES, key=lambda name: name != "lecun"))
def test_initial_weights_are_drawn_as_the_module_draws_them(parametrization):
    x = circle(Config(n=4)).x
    module = NETWORKS["shallow"](512, parametrization=parametrization)
    own = module.init(jax.random.key(0), x)["params"]
    drawn = initial_weights(jax.random.key(1), module, x, seeds=3)
    assert jax.tree.structure(own) == jax.tree.structure(drawn)
    for (path, leaf), w in zip(
        jax.tree_util.tree_leaves_with_path(own), jax.tree.leaves(drawn), strict=True
    ):
        assert w.shape == (3, *leaf.shape)
        v = variance(module, 2, path_of(path), leaf.shape)
        if v is None:
            assert not np.any(leaf)
            assert not np.any(w)
        elif leaf.size >= 64:
            error = 5 * 2**0.5 / leaf.size**0.5
            assert np.mean(leaf**2) == pytest.approx(v, rel=error)
            assert np.mean(w**2) == pytest.approx(v, rel=error)
        if parametrization == "pytorch":
            bound = (3 * v) ** 0.5 * (1 + 1e-12)
            assert max(abs(leaf).max(), abs(w).max()) <= bound


@pytest.mark.thorough
def test_the_mean_kernel_of_gaussian_weights_comes_to_the_limit():
    x = circle(Config(n=6)).x
    module = NETWORKS["shallow"](4096, parametrization="lecun")
    params = initial_weights(jax.random.key(0), module, x, seeds=16)
    mean = np.mean(kernels(params, x, module=module), axis=0)
    wanted = limit(module, x)
    assert mean.shape == wanted.shape == (6, 6)
    assert np.linalg.norm(mean - wanted) < 0.02 * np.linalg.norm(wanted)


def test_a_slope_is_that_of_a_power():
    values = np.array([3.0, 4.0]) * np.array([10.0, 100.0, 1000.0])[:, None] ** -0.5
    assert slope((10, 100, 1000), values) == pytest.approx(-0.5)


@pytest.mark.thorough
def test_the_wider_is_the_nearer_and_the_slope_is_about_a_half(results):
    slopes = results.summary["shallow, ntk"]["slopes"]
    for when in ("before", "after"):
        assert -0.75 < slopes[f"distance from the limit {when} training"] < -0.3
        for network in NETWORKS:
            values = results.arrays[f"{network}, ntk/{when}"]
            assert values.shape == (len(results.config.widths(network)), 6)
            assert np.all(np.diff(np.mean(values**2, axis=1)) < 0)
    assert slopes["relative kernel change"] < -0.5


@pytest.mark.thorough
def test_training_lowers_the_loss_and_hardly_changes_a_wide_kernel(results):
    rows = results.summary["shallow, ntk"]
    wide = rows["width 1024"]
    assert wide["median loss after training"] < wide["median loss before training"] / 2
    assert 0 < wide["relative kernel change"] < rows["width 16"]["relative kernel change"]


@pytest.mark.thorough
def test_figures_have_their_axes_labelled(results):
    figures = plot(results)
    assert set(figures) == {"errors", "circle"}
    errors, circles = figures["errors"].axes, figures["circle"].axes
    assert [ax.get_ylabel() for ax in errors[::2]] == [
        "relative distance from the infinite-width NTK",
        "relative kernel change in training",
    ]
    assert all(ax.get_xlabel() == "width" for ax in errors[2:])
    assert all(ax.get_xscale() == ax.get_yscale() == "log" for ax in errors)
    assert circles[-1].get_xlabel() == "angle between the two points"
    assert [ax.get_title() for ax in circles] == ["shallow, ntk", "deep, ntk"]


@pytest.mark.thorough
def test_conclusions_tell_the_numbers(results):
    told = conclude(results)
    assert [sentence.split(":")[0] for sentence in told] == ["shallow, ntk", "deep, ntk"]
    for sentence, rows in zip(told, results.summary.values(), strict=True):
        for value in rows["slopes"].values():
            assert f"{value:.2f}" in sentence


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"parametrizations": ("jax",)}, ValueError, "`parametrizations` must be one of ntk"),
        ({"parametrizations": ()}, ValueError, "number of `parametrizations.* must be at least 1"),
        ({"shallow_widths": (8, 8)}, ValueError, "`shallow_widths.* at least 2, got 1. A slope"),
        ({"deep_widths": (0, 8)}, ValueError, "`deep_widths` must be at least 1, got 0"),
        ({"seeds": 1}, ValueError, "`seeds` must be at least 2, got 1"),
        ({"fraction": 1.5}, ValueError, "`fraction` must be below 1, got 1.5. Use 0.5"),
        ({"fraction": 0.0}, ValueError, "`fraction` must be positive"),
        ({"steps": 2.5}, TypeError, "`steps` must be a whole number"),
        ({"target": "midle"}, ValueError, "Did you mean middle"),
    ],
)
def test_bad_settings_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        Config(**change)
