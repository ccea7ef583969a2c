"""Figures of the book: one style, the stamp on every figure, no result computed here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from samlib.notebook.run import Run

COLOURS = {"AdamW": "#4c566a", "AdamW, 2x steps": "#8fa1b3", "SAM": "#c8553d", "ASAM": "#2a7f62"}


def style() -> None:
    """Opaque white figures with readable type; call once a notebook."""
    sns.set_theme(context="notebook", style="whitegrid", palette=list(COLOURS.values()))
    plt.rcParams |= {
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
        "figure.figsize": (7, 4),
        "figure.dpi": 110,
        "figure.constrained_layout.use": True,
        "axes.titlesize": "medium",
    }


def stamp(figure: Figure, run: Run, published: str | None = None, beside: bool = False) -> None:
    """Print where the figure comes from under it: notebook, preset, seeds, commit.

    Args:
        figure: to print on.
        run: of the page.
        published: name of the published values that are drawn, such as "central.published"; where there are none,
            the figure is taken to show the run.
        beside: the figure shows both, the run and what is published.
    """
    theirs, texts = run.published_stamp(published) if published else None, []
    if beside or not theirs:
        facts = run.stamp()
        seeds = ", ".join(map(str, facts["seeds"]))
        own = f"{facts['notebook']}, preset {facts['preset']}, seeds {seeds}, commit {facts['commit']}"
        texts.append(f"this run: {own}" if theirs else own)
    if theirs:
        texts.append(f"published values {published}, commit {theirs['commit']}")
    figure.supxlabel("; ".join(texts), fontsize=6, color="0.45", x=0.99, ha="right")


def slide(draw: Callable[[Any], Figure], slider: Any) -> Any:
    """A slider above the figure of its value, for a notebook in which somebody can move it.

    The figure is shown as a picture. `ipywidgets.interact` would catch output in a widget of its own, on which
    papermill sometimes waits for ever (github.com/nteract/papermill/issues/723).

    Args:
        draw: value of the slider -> figure, which is closed when it has been pictured.
        slider: one of ipywidgets.

    Returns:
        A widget for IPython's `display`.

    Taught in: 02_deriving_sam.
    """
    import ipywidgets

    picture = ipywidgets.Image(format="png")

    def show(_: Any = None) -> None:
        figure, page = draw(slider.value), BytesIO()
        figure.savefig(page, format="png")
        plt.close(figure)
        picture.value = page.getvalue()

    slider.observe(show, "value")
    show()
    return ipywidgets.VBox([slider, picture])


def images(pixels: Tensor, titles: Sequence[str], columns: int = 8) -> Figure:
    """A grid of small images.

    Args:
        pixels: uint8 (N, 3, H, W).
        titles: N short texts.
        columns: images in one row.
    """
    rows = -(-len(pixels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.05 * columns, 1.3 * rows), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, image, title in zip(axes.flat, pixels, titles, strict=False):
        ax.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        ax.set_title(title, fontsize=7)
    return figure


def bars(table: pd.DataFrame, ax: Axes) -> None:
    """Grouped points with intervals: one group a model, one colour an arm.

    Args:
        table: index (arm, model), columns mean, low, high, as `central.table` gives it.
        ax: where to draw.
    """
    arms = list(dict.fromkeys(table.index.get_level_values(0)))
    models = list(dict.fromkeys(table.index.get_level_values(1)))
    for i, arm in enumerate(arms):
        rows = table.loc[arm].loc[models]
        x = np.arange(len(models)) + 0.16 * (i - (len(arms) - 1) / 2)
        error = np.nan_to_num(np.stack([rows["mean"] - rows["low"], rows["high"] - rows["mean"]]))
        ax.errorbar(x, rows["mean"], error, fmt="o", capsize=3, label=arm, color=COLOURS.get(arm))
    ax.set_xticks(range(len(models)), models)
    ax.legend()


def heatmap(values: Tensor, grid_1: Sequence[float], grid_2: Sequence[float], ax: Axes, **limits: float) -> None:
    """A map over two coefficients, a_1 upwards and a_2 to the right.

    Args:
        values: (len(grid_1), len(grid_2)).
        grid_1, grid_2: the coefficients.
        ax: where to draw.
        limits: vmin and vmax of the colours.
    """
    frame = pd.DataFrame(values.numpy(), index=[f"{a:g}" for a in grid_1], columns=[f"{a:g}" for a in grid_2])
    sns.heatmap(frame.iloc[::-1], ax=ax, cmap="rocket_r", square=True, **limits)
    ax.set(xlabel="$a_2$", ylabel="$a_1$")
