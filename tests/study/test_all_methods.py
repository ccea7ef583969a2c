from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from samlib import merge
from samlib.data.tasks import load_task
from samlib.model import evaluate
from samlib.model.head import zero_shot_head
from samlib.model.theta import Theta, weights_of
from samlib.notebook.run import Run
from samlib.study import all_methods, arms
from samlib.study.all_methods import MERGES
from samlib.study.arms import ARMS, JOINT
from samlib.train.finetune import finetune_many


def test_every_method_of_the_registry_is_in_the_table() -> None:
    assert {m.function for m in MERGES.values()} == set(merge.METHODS)
    for method in MERGES.values():
        assert (method.grid is None) == ("lam" not in merge.METHODS[method.function].rules)


def test_rows_are_those_of_the_methods_at_the_lambda_of_the_validation_splits(run: Run, tiny: Any) -> None:
    found = all_methods.measure(run, ARMS["AdamW"], 0)
    assert list(found) == ["single", *MERGES] and found["single"]["normalised"] == 1
    thetas = [d.theta for d in finetune_many(arms.recipes(run, ARMS["AdamW"], 0), tiny, "cpu", run.cache)]
    theta_0 = weights_of(tiny.encoder)
    loaded = [load_task(name) for name in run.preset.tasks]
    heads = [zero_shot_head(tiny, task) for task in loaded]

    def scores(theta: Theta, split: str) -> list[float]:
        parts = zip((getattr(task, split) for task in loaded), heads, strict=True)
        return [evaluate.accuracy(tiny.encoder, theta, *part) for part in parts]

    single = [scores(theta, "validation")[t] for t, theta in enumerate(thetas)]
    for name in ("task arithmetic", "TSV-M"):
        function = getattr(merge, MERGES[name].function)
        grid = getattr(run.preset, str(MERGES[name].grid))
        curve = []
        for lam in grid:  # by hand: merge anew for every lam
            pairs = zip(scores(function(theta_0, thetas, lam=lam), "validation"), single, strict=True)
            curve.append(sum(a / b for a, b in pairs) / 2)
        assert found[name]["curve"] == pytest.approx(curve, abs=0.06)  # one image between two classes may change sides
        assert found[name]["lam"] in grid
        best = function(theta_0, thetas, lam=found[name]["lam"])
        assert list(found[name]["accuracy"].values()) == pytest.approx(scores(best, "test"), abs=0.05)
    images = [task.validation.images for task in loaded]
    fisher = merge.fisher(tiny.encoder, theta_0, thetas, images, heads, seed=0)
    assert list(found["Fisher"]["accuracy"].values()) == pytest.approx(scores(fisher, "test"), abs=0.05)


def test_the_joint_model_is_one_for_all_tasks_with_all_their_updates(run: Run, tiny: Any) -> None:
    (recipe,) = arms.recipes(run, JOINT, 4)
    single = arms.recipes(run, ARMS["AdamW"], 4)[0]
    assert recipe == dataclasses.replace(single, tasks=("warm", "cool"), steps=2 * single.steps)
    found = all_methods.measure(run, JOINT, 4)
    assert list(found) == ["single"]
    (done,) = finetune_many([recipe], tiny, "cpu", run.cache)
    for name, accuracy in found["single"]["accuracy"].items():
        task = load_task(name)
        head = zero_shot_head(tiny, task)
        assert accuracy == evaluate.accuracy(tiny.encoder, done.theta, task.test, head)
