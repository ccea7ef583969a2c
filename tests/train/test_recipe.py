from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from samlib.train.recipe import Recipe

RECIPE = Recipe("warm", "sam", steps=12, rho=0.05, lr=1e-2, batch_size=16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ()}, r"tasks must be one or more names, such as \('digits',\), not \(\)"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, sam, asam, rwp, not 'sgd'"),
        ({"steps": 0}, "steps must be an integer >= 1, not 0"),
        ({"steps": 1.5}, "steps must be an integer"),
        ({"rho": -0.1}, "rho must be a finite number >= 0, not -0.1"),
        ({"optimizer": "adamw"}, "rho must be 0.0 for adamw, not 0.05"),
        ({"eta": 0.1}, "eta must be 0.0 unless the optimizer is asam"),
        ({"lr": 0.0}, "lr must be a finite number > 0"),
        ({"lr": math.nan}, "lr must be a finite number > 0"),
        ({"warmup": 1.0}, r"warmup must be a number in \[0, 1\)"),
        ({"clip_norm": 0.0}, "clip_norm must be a finite number > 0 or None"),
        ({"n_train": 0}, "n_train must be"),
        ({"label_noise": 1.0}, r"label_noise must be a number in \[0, 1\)"),
        ({"batch_size": True}, "batch_size must be"),
        ({"seed": -1}, "seed must be"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16"),
        ({"every": 0}, "every must be"),
        ({"optimizer": "adamw", "rho": 0.0, "every": 2}, "every must be 1 for adamw, not 2"),
        ({"optimizer": "adamw", "rho": 0.0, "norms_only": True}, "norms_only must be False for adamw"),
        ({"scale_biases": False}, "scale_biases must be True unless the optimizer is asam"),
        ({"rho": math.inf}, "rho must be"),
        ({"decay": 0.9}, "decay must be 0.99 unless the average is ema"),
        ({"micro_batch": 0}, "micro_batch must be"),
        ({"average": "mean"}, "average must be one of none, ema, swa"),
        ({"average": "ema", "decay": 1.0}, r"decay must be a number in \(0, 1\)"),
        ({"validate_every": 0}, "validate_every must be"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
    ],
)
def test_a_recipe_checks_itself(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPE, **change)


def test_equal_recipes_have_one_key() -> None:
    whole = dataclasses.replace(RECIPE, rho=1, lr=1, weight_decay=0)
    assert repr(whole) == repr(dataclasses.replace(RECIPE, rho=1.0, lr=1.0, weight_decay=0.0))
