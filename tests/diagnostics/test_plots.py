import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pyro_flows_ext.diagnostics import plots


@pytest.fixture(autouse=True)
def _leaves_matplotlib_alone() -> Iterator[None]:
    before = dict(matplotlib.rcParams.copy())
    yield
    assert dict(matplotlib.rcParams.copy()) == before


def draws(num: int = 400, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(num, 2, 2, generator=generator)
    return {"mu": torch.randn(num, generator=generator), "theta": theta}


def drawn(axes: np.ndarray) -> Figure:
    """The figure, drawn: constrained layout and formatters run without a warning (warnings are errors)."""
    figure = axes.flat[0].figure
    FigureCanvasAgg(figure).draw()
    return figure


def test_posterior_grid() -> None:
    axes = plots.posterior(draws(), reference=draws(seed=1))
    figure = drawn(axes)
    assert axes.shape == (5, 5)
    visible = np.array([[ax.axison for ax in row] for row in axes])
    np.testing.assert_array_equal(visible, np.tri(5, dtype=bool))
    names = ["mu", "theta[0,0]", "theta[0,1]", "theta[1,0]", "theta[1,1]"]
    assert [ax.get_xlabel() for ax in axes[-1]] == names
    assert [ax.get_ylabel() for ax in axes[1:, 0]] == names[1:]
    legend = axes[0, -1].get_legend()
    assert [t.get_text() for t in legend.get_texts()] == ["guide", "reference"]
    # Contours of both sets of draws in a pair, two outlines in a marginal.
    colors = {
        c for ax in axes[1:2, 0] for s in ax.collections for c in map(tuple, s.get_edgecolor())
    }
    for color in (plots.DRAWS_COLOR, plots.REFERENCE_COLOR):
        assert matplotlib.colors.to_rgba(color) in colors
    assert not overlapping(figure)


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts on the figure that cover one another."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = []
    for ax in figure.axes:
        texts = [ax.xaxis.label, ax.yaxis.label, ax.xaxis.offsetText, ax.yaxis.offsetText]
        texts += [t for axis in (ax.xaxis, ax.yaxis) for t in visible_tick_labels(axis)]
        legend = ax.get_legend()
        texts += legend.get_texts() if legend else []
        boxes += [
            (t.get_text(), t.get_window_extent(renderer))
            for t in texts
            if t.get_visible() and t.get_text() and ax.axison
        ]
    return [
        (a, b)
        for i, (a, box) in enumerate(boxes)
        for b, other in boxes[i + 1 :]
        if box.overlaps(other)
    ]


def visible_tick_labels(axis: matplotlib.axis.Axis) -> list[matplotlib.text.Text]:
    low, high = sorted(axis.get_view_interval())
    return [
        tick.label1
        for tick in axis.get_major_ticks()
        if tick.label1.get_visible() and low <= tick.get_loc() <= high
    ]


@pytest.mark.parametrize("scale", [1e-6, 0.03, 1.0, 4e3, 1e7], ids=str)
def test_no_text_on_text(scale: float) -> None:
    samples = {
        f"a_rather_long_name_of_a_site_{i}": v for i, v in enumerate(draws()["theta"][:, 0].T)
    }
    samples = {name: scale * (value + 3) for name, value in samples.items()}
    figure = drawn(plots.posterior({**samples, "mu": draws()["mu"]}))
    assert not overlapping(figure)


def test_names_select_and_order() -> None:
    axes = plots.posterior(draws(), names=["theta[1,0]", "mu"])
    assert [ax.get_xlabel() for ax in axes[-1]] == ["theta[1,0]", "mu"]
    assert plots.posterior(draws(), names=["theta"]).shape == (4, 4)
    with pytest.raises(ValueError, match="'nu'"):
        plots.posterior(draws(), names=["nu"])


def test_says_what_it_leaves_out() -> None:
    axes = plots.posterior(draws(), max_panels=2)
    assert axes.shape == (2, 2)
    assert axes[0, -1].get_legend().get_title().get_text() == "2 of 5 parameters"


@pytest.mark.parametrize("with_reference", [False, True], ids=["alone", "reference"])
def test_one_scalar(with_reference: bool) -> None:
    samples = {"mu": draws()["mu"]}
    axes = plots.posterior(samples, reference={"mu": np.zeros(9)} if with_reference else None)
    assert axes.shape == (1, 1)
    assert isinstance(axes[0, 0], Axes)
    assert (axes[0, 0].get_legend() is not None) == with_reference
    drawn(axes)


NORMAL = draws(50)["mu"]
AWKWARD = {
    "constant": torch.ones(50),
    "large_constant": torch.full((50,), 1e8),
    "counts": torch.arange(50.0) % 3,
    "an_infinity": torch.cat([NORMAL[:49], torch.tensor([torch.inf])]),
    "nans": torch.cat([NORMAL[:40], torch.full((10,), torch.nan)]),
    "outlier": torch.cat([NORMAL[:49], torch.tensor([1e6])]),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_draws(name: str) -> None:
    value = AWKWARD[name]
    axes = plots.posterior({"x": value, "y": draws(50, seed=1)["mu"]})
    drawn(axes)
    low, high = axes[-1, 0].get_xlim()
    finite = value[value.isfinite()]
    assert ((finite >= low) & (finite <= high)).float().mean() >= 0.9
    assert max(axes[0, 0].patches[-1].get_xy()[:, 1]) > 0  # the marginal is not empty


def test_few_draws() -> None:
    drawn(plots.posterior({"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([0.0, 1.0])}))
    drawn(plots.posterior({"x": torch.tensor([1.5]), "y": torch.tensor([0.0])}))


def test_counts_have_a_bar_each() -> None:
    axes = plots.posterior({"k": torch.arange(60.0) % 3})
    vertices = axes[0, 0].patches[-1].get_xy()
    assert {-0.5, 0.5, 1.5, 2.5} <= set(vertices[:, 0])


def test_contours_respect_a_bound() -> None:
    """A positive parameter's contours stay positive."""
    generator = torch.Generator().manual_seed(0)
    tau = -torch.rand(2000, generator=generator).log()
    axes = plots.posterior({"tau": tau, "y": torch.randn(2000, generator=generator)})
    lowest = min(
        path.vertices[:, 0].min()
        for collection in axes[1, 0].collections
        for path in collection.get_paths()
        if len(path.vertices)
    )
    assert lowest >= 0


def test_contour_levels_hold_their_share() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(20_000, 2, generator=generator, dtype=torch.float64).numpy()
    low, high = plots._mass_levels(plots._density(z[:, 0], z[:, 1], (-4, 4), (-4, 4))[-1])
    x, y, density = plots._density(z[:, 0], z[:, 1], (-4, 4), (-4, 4))
    for level, share in ((low, 0.9), (high, 0.5)):
        # the region {density > level} is a disc, whose radius holds the share by 1 - exp(-r² / 2)
        cell = (x[2] - x[1]) * (y[2] - y[1])
        radius_squared = (density > level).sum() * cell / np.pi
        assert 1 - np.exp(-radius_squared / 2) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("samples", [{}, {"x": torch.full((9,), torch.nan)}], ids=["none", "nan"])
def test_posterior_refuses(samples: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="expected"):
        plots.posterior(samples)


def test_draws_into_a_given_figure() -> None:
    figure = Figure()
    axes = plots.posterior(draws(), names=["mu"], figure=figure)
    assert axes[0, 0].figure is figure


# --- loss ---


def falling(num: int) -> np.ndarray:
    steps = np.arange(num)
    noise = np.random.default_rng(0).normal(size=num)
    return 60 + 1e6 * np.exp(-steps / 5) + noise


def test_first_steps_do_not_ruin_the_scale() -> None:
    ax = plots.loss(falling(1000))
    low, high = ax.get_ylim()
    assert 50 < low < 58
    assert 62 < high < 70
    assert any("1e+06" in text.get_text() for text in ax.get_legend().get_texts())
    drawn(np.array([ax]))


def test_running_median_follows_the_loss() -> None:
    losses = falling(3000)
    losses[::100] = 1e5  # outliers that a mean would follow
    line = plots.loss(losses).lines[-1]
    later = line.get_xdata() > 500
    np.testing.assert_allclose(line.get_ydata()[later], 60, atol=0.5)
    assert line.get_xdata()[-1] == 3000


@pytest.mark.parametrize("num", [1, 2, 7, 100], ids=str)
def test_short_runs(num: int) -> None:
    drawn(np.array([plots.loss(falling(100)[-num:])]))


def test_takes_a_result_a_list_and_skipped_steps() -> None:
    losses = torch.linspace(10, 1, 50)
    losses[7] = torch.nan
    for given in (losses, losses.tolist(), SimpleNamespace(losses=losses)):
        line = plots.loss(given).lines[0]
        assert len(line.get_xdata()) == 49
        assert 8 not in line.get_xdata()
    with pytest.raises(ValueError, match="finite"):
        plots.loss([float("nan")])
    with pytest.raises(ValueError, match="one number a step"):
        plots.loss(torch.zeros(5, 2))


def test_draws_into_given_axes() -> None:
    ax = Figure().add_subplot()
    assert plots.loss([3.0, 2.0, 1.0], ax=ax) is ax


@pytest.mark.slow
def test_importing_diagnostics_imports_neither_matplotlib_nor_arviz() -> None:
    code = (
        "import sys, pyro_flows_ext.diagnostics\n"
        "print([m for m in ('matplotlib', 'arviz', 'pandas', 'xarray') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.slow
def test_plots_do_not_import_pyplot() -> None:
    code = (
        "import sys, torch\n"
        "from pyro_flows_ext.diagnostics import plots\n"
        "plots.posterior({'x': torch.randn(50, 2)}); plots.loss([2.0, 1.0])\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
