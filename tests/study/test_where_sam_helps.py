from __future__ import annotations

import pandas as pd
import pytest

from samlib.study import where_sam_helps


def gains(steps: int, n_train: int, noise: float, **values: float) -> list[dict[str, object]]:
    """Of two seeds and tasks, with a little scatter."""
    return [
        {"steps": steps, "n_train": n_train, "label_noise": noise, "rho": 0.02, "base": "AdamW"}
        | {"seed": seed, "task": task}
        | {name: values.get(name, 0.0) + 0.01 * (seed - 0.5) + 0.01 * (task - 0.5) for name in where_sam_helps.BETTER}
        for seed in (0, 1)
        for task in (0, 1)
    ]


def test_a_cell_says_whether_sam_is_better_beyond_the_noise() -> None:
    cells = where_sam_helps.cells(pd.DataFrame(gains(96, 1000, 0.0, single=-3.0, normalised=2.0, gap_average=-1.0)))
    judged = cells.set_index("value")["judged"]
    assert judged["normalised"] == judged["gap_average"] == 1  # more accuracy kept; a smaller gap
    assert judged["single"] == -1
    assert judged["averaging"] == judged["task arithmetic"] == 0
    one = cells.set_index("value").loc["single"]
    assert one["mean"] == one["effect"].mean == pytest.approx(-3.0)
    assert (one["rho"], one["base"], one["regime"]) == (0.02, "AdamW", "96 steps, 1,000 images")


def test_the_map_goes_from_the_usual_to_the_unusual() -> None:
    rows = gains(256, 1000, 0.3) + gains(256, 250, 0.0) + gains(768, 1000, 0.0) + gains(96, 1000, 0.0)
    assert list(dict.fromkeys(where_sam_helps.cells(pd.DataFrame(rows))["regime"])) == [
        "96 steps, 1,000 images",
        "768 steps, 1,000 images",
        "256 steps, 250 images",
        "256 steps, 1,000 images, 30 % wrong",
    ]
