from __future__ import annotations

from typing import Any

from samlib.study import flatness_chain


def result() -> dict[str, Any]:
    """What is measured of one model, with numbers that are easy to follow."""
    found = {"test accuracy lost": 0.25, "length": 2.0, "first": 1.0, "second": 4.0, "eigenvalues": [9.0, 5.0, 3.0]}
    found |= {"test first": 2.0, "test second": 6.0, "sharpness": {"SAM": {"worst": 7.0, "average": 1.0}}}
    rises = [0.0, 1.0, 2.0, 3.0]
    merge = {"energy": 0.125, "cosine": 1.0, "rise": rises}
    found["directions"] = {"merge": merge, "SAM": {"energy": 0.5, "cosine": -0.25, "rise": rises}}
    return {"arm": "SAM, rho 0.02", "seed": 1, "recipes": [{"rho": 0.02}], "tasks": {"digits": found}}


def test_one_row_a_model() -> None:
    (row,) = flatness_chain.table([result()]).to_dict("records")
    assert (row["arm"], row["rho"], row["seed"], row["task"]) == ("SAM, rho 0.02", 0.02, 1, "digits")
    assert (row["top eigenvalue"], row["last eigenvalue"], row["SAM sharpness"]) == (9.0, 3.0, 7.0)
    assert (row["quadratic"], row["test quadratic"], row["points lost"], row["energy"]) == (5.0, 8.0, 25.0, 0.125)
    assert row["test along"] == 3.0  # eps^T H eps / ||eps||^2, from half of it


def test_one_row_a_direction_and_share_of_the_way() -> None:
    walks = flatness_chain.walks([result()])
    assert list(walks["direction"]) == ["merge"] * 4 + ["SAM"] * 4
    assert list(walks["share"]) == 2 * list(flatness_chain.SHARES) and list(walks["rise"]) == 2 * [0.0, 1.0, 2.0, 3.0]
    assert set(walks[walks["direction"] == "SAM"]["cosine"]) == {0.25}  # its size
