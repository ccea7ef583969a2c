"""The whole path of the preset `paper` with the real ViT-B/32, at random initialisation and a handful of steps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import HUB_TASKS as TASKS

from samlib.data import augment, tasks
from samlib.data.tasks import load_task, subset
from samlib.measure import hessian
from samlib.measure.interference import xi
from samlib.merge import task_arithmetic
from samlib.model.clip import Clip, load_clip
from samlib.model.head import zero_shot_head
from samlib.model.theta import flat, task_vector, weights_of
from samlib.notebook.run import Run, begin
from samlib.study.arms import ARMS, recipes
from samlib.study.scoring import at_best_lambda, bench, score
from samlib.train import beside, loop
from samlib.train.finetune import Finetuned, finetune

MODEL = "ViT-B-32/random"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(hub_tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMLIB_DATA", str(hub_tasks))
        patch.setenv("SAMLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        sizes = {"steps": 3, "batch_size": 4, "n_train": 12, "n_eval": 16}
        yield begin("dry_run", dict(preset="paper", device="cpu", model=MODEL, tasks=list(TASKS), **sizes))


@pytest.fixture(scope="module")
def clip(run: Run) -> Clip:
    torch.set_num_threads(2)
    return load_clip(run.device, run.preset.model)


@pytest.fixture(scope="module")
def trained(run: Run, clip: Clip) -> dict[str, list[Finetuned]]:
    """One model a task, by each optimiser."""
    return {
        arm: [finetune(recipe, clip, run.device, run.cache) for recipe in recipes(run, ARMS[arm], 0)]
        for arm in ("AdamW", "SAM", "ASAM")
    }


def test_training_data_are_those_of_the_task(run: Run, clip: Clip) -> None:
    for name in TASKS:
        task = load_task(name, clip.size)
        assert clip.size == 224 and task.train.images.shape[1:] == (3, 32, 32)  # enlarged by the model
        head = zero_shot_head(clip, task)
        assert head.shape == (len(task.classes), 512)
        torch.testing.assert_close(head.norm(dim=1), clip.model.logit_scale.exp().expand(len(head)))


def test_fine_tuning_learns_and_the_optimisers_differ(trained: dict[str, list[Finetuned]]) -> None:
    for arm, models in trained.items():
        for done in models:
            assert done.log["loss"].notna().all() and done.recipe.shared_climb and done.recipe.micro_batch == 4
            climbed = (done.log["loss_perturbed"] - done.log["loss"]).iloc[-1]
            assert climbed == 0 if arm == "AdamW" else climbed > 0
    one, other = (trained[arm][0].theta for arm in ("SAM", "ASAM"))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_checkpoint_header_names_the_model(run: Run, trained: dict[str, list[Finetuned]]) -> None:
    from safetensors import safe_open

    headers = []
    for file in (run.cache / "finetune").glob("*/theta.safetensors"):
        with safe_open(file, "pt") as stored:
            headers.append(stored.metadata())
    assert all(h["revision"] == tasks.fingerprint(h["task"], 224) and h["commit"] for h in headers)
    assert len(headers) == 9 and {h["model"] for h in headers} == {MODEL} and {h["task"] for h in headers} == {*TASKS}
    assert {json.dumps(asdict(d.recipe)) for models in trained.values() for d in models} == {
        h["recipe"] for h in headers
    }


def test_an_interrupted_run_goes_on_with_other_micro_batches(
    run: Run,
    clip: Clip,
    trained: dict[str, list[Finetuned]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Stopped in the second step, resumed on what could be a smaller device."""
    whole = trained["SAM"][2]
    calls = []
    original = augment.augment

    def stop(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(beside, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(loop, "augment", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(whole.recipe, clip, run.device, tmp_path)
    again = finetune(replace(whole.recipe, micro_batch=2), clip, run.device, tmp_path)
    assert len(calls) == 2 + (whole.recipe.steps - 1)  # nothing was done twice but what was cut off
    start = weights_of(clip.encoder)
    way = sum(float((w - start[name]).square().sum()) for name, w in whole.theta.items())
    apart = sum(float((again.theta[name] - w).square().sum()) for name, w in whole.theta.items())
    assert apart < 0.04 * way, f"{(apart / way) ** 0.5:.3f} of the way; sums in another order turn some of Adam's signs"
    assert again.log["loss"].to_numpy() == pytest.approx(whole.log["loss"].to_numpy(), rel=1e-3)


def test_merge_measure_and_look_at_the_curvature(run: Run, trained: dict[str, list[Finetuned]]) -> None:
    b = bench(run)
    thetas = [done.theta for done in trained["SAM"]]
    summed = task_arithmetic(b.theta_0, thetas, 1.0)
    merged, facts = at_best_lambda(b, summed, (0.0, 0.5), [1.0] * len(TASKS))
    accuracies, losses = score(b, [merged], b.tests)
    assert all(0 <= a <= 1 for a in accuracies) and all(0 < loss < 20 for loss in losses)
    assert facts["lam"] in (0.0, 0.5)
    few = [subset(split, 8) for split in b.tests]
    pair = thetas[0], thetas[1], few[0], b.heads[0], few[1], b.heads[1]
    error = xi(b.encoder, b.theta_0, *pair, [1.0], [0.0, 1.0])
    assert error.shape == (1, 2) and 0 <= float(error.min()) and float(error.max()) <= 2
    operator = hessian.hessian(b.encoder, thetas[1], subset(b.trains[1], 1), b.heads[1])
    values, vectors = hessian.top_eigenvalues(operator, 1, tol=0.02)
    with hessian.second_derivatives():
        residual = (operator @ vectors[:, 0].float()) - float(values[0]) * vectors[:, 0].float()
    assert float(residual.norm()) < 0.05 * abs(float(values[0])), "an eigenvector"
    assert float(values[0]) > 0 and float(flat(task_vector(thetas[1], b.theta_0)).norm()) > 0


def test_memory_and_time_are_as_estimated(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prediction and training in processes of their own; time is noisy where others compute, so it may try again."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(asdict(replace(recipes(run, ARMS["SAM"], 0)[0], steps=6, batch_size=8, micro_batch=4)))
    )
    command = [sys.executable, "-m", "samlib.train", "--config", str(recipe), "--device", "cpu", "--model", MODEL]
    pattern = r"([\d.]+) GB of memory[^\d]*([\d.]+) s a step"
    ratios = []
    for attempt in range(3):
        found = []
        for extra in (["--estimate"], ["--cache", str(run.cache / f"again{attempt}")]):
            answer = subprocess.run([*command, *extra], capture_output=True, text=True, check=True)
            match = re.search(pattern, answer.stdout)
            assert match, answer.stdout
            found.append([float(x) for x in match.groups()])
        (memory, seconds), (peak, step) = found
        with capsys.disabled():
            print(
                f"\n{MODEL}, SAM: estimated {memory:.2f} GB and {seconds:.2f} s a step, "
                f"measured {peak:.2f} GB and {step:.2f} s a step"
            )
        assert memory == pytest.approx(peak, rel=0.25)
        ratios.append(seconds / step)
        if 0.75 < ratios[-1] < 1.25:
            return
    raise AssertionError(f"estimated time over measured time: {ratios}")
