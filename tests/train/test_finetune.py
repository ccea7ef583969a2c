from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from samlib.data import augment, batches, catalogue
from samlib.data.tasks import Split, load_task
from samlib.model import clip, evaluate
from samlib.model.clip import load_clip
from samlib.model.head import zero_shot_head
from samlib.model.theta import weights_of
from samlib.store import checkpoint, keys
from samlib.train import beside, finetune, loop, result, sam, schedule
from samlib.train.finetune import finetune_many, train_many
from samlib.train.loop import Finetuned
from samlib.train.recipe import OPTIMIZERS, Recipe

RECIPE = Recipe("warm", "sam", steps=12, rho=0.05, lr=1e-2, batch_size=16)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture()
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes that were really trained."""
    recipes: list[Recipe] = []

    def counted(recipe: Recipe, *rest: Any) -> Finetuned:
        recipes.append(recipe)
        return loop.train(recipe, *rest)

    monkeypatch.setattr(finetune, "train", counted)
    return recipes


# ---- learning rate, order, augmentation


@given(steps=st.integers(1, 300), warmup=st.floats(0, 0.9))
def test_lr_rises_to_its_peak_and_falls_to_almost_zero(steps: int, warmup: float) -> None:
    rates = [schedule.lr_at(step, steps, 0.5, warmup) for step in range(steps)]
    top = int(warmup * steps)
    assert max(rates) == pytest.approx(0.5) and rates[top] == pytest.approx(0.5)
    assert all(a < b for a, b in zip(rates[:top], rates[1:top], strict=False))
    assert all(a > b > 0 for a, b in zip(rates[top:], rates[top + 1 :], strict=False))
    assert rates[:top] == pytest.approx([0.5 * (i + 1) / top for i in range(top)])


def test_lr_halfway_down_the_cosine_is_half() -> None:
    assert schedule.lr_at(60, 100, 1.0, 0.2) == pytest.approx(0.5)


@given(n=st.integers(1, 30), batch_size=st.integers(1, 40), seed=st.integers(0, 5))
def test_every_epoch_sees_every_example_once(n: int, batch_size: int, seed: int) -> None:
    steps = math.ceil(3 * n / batch_size)
    order = torch.cat([batches.batch_indices(n, batch_size, seed, step) for step in range(steps)])
    assert len(order) == steps * batch_size
    for epoch in range(3):
        assert sorted(order[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


def test_order_depends_on_seed_and_epoch() -> None:
    first, again, other = (batches.batch_indices(50, 50, seed, 0) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, batches.batch_indices(50, 50, 0, 1))


def test_augmentation_crops_between_90_and_100_percent_inside_the_image() -> None:
    """On a ramp the crop's values are again a ramp: its slope and its ends show where the crop lies."""
    ramp = torch.arange(32, dtype=torch.uint8).expand(500, 3, 32, 32)  # pixel value = column
    both = torch.stack([ramp[:, 0], ramp[:, 0].mT, ramp[:, 0]], 1)  # channel 1: pixel value = row
    out = augment.augment(both, torch.Generator().manual_seed(0)) * 255
    assert out.shape == (500, 3, 32, 32) and out.dtype == torch.float32
    width = (out[:, 0, 0, 30] - out[:, 0, 0, 1]) / 29  # columns of the input a column of the output
    height = (out[:, 1, 30, 0] - out[:, 1, 1, 0]) / 29
    area = width * height
    assert area.min() > 0.899 and area.max() < 1.001 and width.max() < 1.001 and height.max() < 1.001
    assert area.min() < 0.905 and area.max() > 0.995 and (width / height).std() > 0.01
    assert width.min() > 0 and height.min() > 0  # no flips


def test_augmentation_depends_on_its_generator_alone() -> None:
    images = load_task("warm").train.images[:8]
    first, again, other = (augment.augment(images, batches.generator("a", step)) for step in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.min() >= 0 and first.max() <= 1


# ---- training


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fine_tuning_learns_the_task(optimizer: str, tiny: Any, tmp_path: Path) -> None:
    rho = {"adamw": 0.0, "sam": 0.05, "asam": 0.5, "rwp": 0.05}[optimizer]
    recipe = Recipe("warm", optimizer, steps=60, rho=rho, lr=1e-2, batch_size=32, diagnose=True)
    done = finetune.finetune(recipe, tiny, "cpu", tmp_path)
    task = load_task("warm")
    head = zero_shot_head(tiny, task)
    assert evaluate.accuracy(tiny.encoder, done.theta, task.test, head) > 0.9 and done.train_accuracy > 0.9
    logits = evaluate.logits(tiny.encoder, done.theta, task.train.images, head)
    assert done.train_loss == pytest.approx(F.cross_entropy(logits, task.train.labels).item(), rel=1e-6)
    assert list(done.log.columns) == ["step", "loss", "loss_perturbed", "grad_norm", "cosine", "eps_norm", "lr"]
    undiagnosed = finetune.finetune(dataclasses.replace(recipe, diagnose=False), tiny, "cpu", tmp_path)
    assert same(done.theta, undiagnosed.theta)  # looking changes nothing
    assert undiagnosed.log.equals(done.log.drop(columns=["cosine", "eps_norm"]))
    assert done.log["step"].tolist() == list(range(60))
    assert done.log["loss"].iloc[-5:].max() < done.log["loss"].iloc[:5].min()
    higher = (done.log["loss_perturbed"] > done.log["loss"]).mean()
    assert higher == 0 if optimizer == "adamw" else higher > (0.2 if optimizer == "rwp" else 0.9)
    if optimizer in ("sam", "rwp"):
        assert done.log["eps_norm"].to_numpy() == pytest.approx(rho, rel=1e-3)


def test_the_first_step_is_adamw_on_the_scaled_cosine_loss(tiny: Any, tmp_path: Path) -> None:
    """One step by hand: same batch, same augmentation, zero-shot head frozen."""
    recipe = Recipe("warm", "adamw", 1, lr=1e-2, batch_size=16, warmup=0, clip_norm=None, weight_decay=0.3)
    done = finetune.finetune(recipe, tiny, "cpu", tmp_path)
    task = load_task("warm")
    head = zero_shot_head(tiny, task)
    assert head.norm(dim=1).tolist() == pytest.approx([math.exp(2.0)] * 3, rel=1e-5)
    index = batches.batch_indices(54, 16, 0, 0)
    images = augment.augment(task.train.images[index], batches.generator("augment", 0, 0))
    F.cross_entropy(tiny.encoder(images) @ head.T, task.train.labels[index]).backward()
    for name, p in tiny.encoder.named_parameters():
        assert p.grad is not None
        step = p.grad / (p.grad.abs() + 1e-8)  # AdamW's first step: m / sqrt(v) is the gradient's sign
        assert torch.allclose(done.theta[name], p.detach() * (1 - 1e-2 * 0.3) - 1e-2 * step, atol=1e-6)
        p.grad = None


def test_the_pretrained_model_is_left_alone(tiny: Any, tmp_path: Path) -> None:
    before = weights_of(tiny.encoder)
    finetune.finetune(RECIPE, tiny, "cpu", tmp_path)
    assert same(before, weights_of(tiny.encoder))
    assert all(p.grad is None for p in tiny.encoder.parameters())


def test_sam_with_rho_zero_is_adamw_and_rho_matters(tiny: Any, tmp_path: Path) -> None:
    def theta(optimizer: str, rho: float) -> dict[str, Tensor]:
        recipe = dataclasses.replace(RECIPE, optimizer=optimizer, rho=rho)
        return finetune.finetune(recipe, tiny, "cpu", tmp_path).theta

    assert same(theta("sam", 0.0), theta("adamw", 0.0))
    assert not same(theta("sam", 0.05), theta("adamw", 0.0))


def test_every_parameter_of_the_embedded_architecture_trains(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, encoder, tokenizer = clip.build()
    fresh = clip.Clip(encoder, model.eval(), tokenizer, "random")
    recipe = Recipe("digits", "asam", steps=2, rho=0.5, lr=1e-3, batch_size=8, n_train=20)
    done = finetune.finetune(recipe, fresh, "cpu", tmp_path)
    assert not [name for name, w in weights_of(encoder).items() if torch.equal(w, done.theta[name])]


def test_fine_tuning_the_embedded_model_beats_its_zero_shot_accuracy(tmp_path: Path) -> None:
    real = load_clip()
    task = load_task("digits")
    head = zero_shot_head(real, task)
    done = finetune.finetune(Recipe("digits", "sam", steps=12, rho=0.05, lr=1e-3), real, "cpu", tmp_path)
    before = evaluate.accuracy(real.encoder, weights_of(real.encoder), task.test, head)
    assert evaluate.accuracy(real.encoder, done.theta, task.test, head) > before + 0.1


def test_bf16_keeps_fp32_weights(tiny: Any, tmp_path: Path) -> None:
    done = finetune.finetune(dataclasses.replace(RECIPE, precision="bf16"), tiny, "cpu", tmp_path)
    assert all(p.dtype == torch.float32 for p in done.theta.values())
    exact = finetune.finetune(RECIPE, tiny, "cpu", tmp_path)
    assert not same(done.theta, exact.theta)
    assert done.log["loss"].tolist() == pytest.approx(exact.log["loss"].tolist(), rel=0.05)


def test_n_train_limits_the_examples(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()

    def spy(n: int, batch_size: int, seed: int, step: int) -> Tensor:
        seen.add(n)
        return batches.batch_indices(n, batch_size, seed, step)

    monkeypatch.setattr(loop, "batch_indices", spy)
    finetune.finetune(dataclasses.replace(RECIPE, n_train=10), tiny, "cpu", tmp_path)
    assert seen == {10}


def test_wrong_labels_are_a_share_of_other_classes_and_nested() -> None:
    labels = torch.arange(4000) % 5

    def at(share: float) -> Tensor:
        return batches.mislabel(labels, 5, share, batches.generator("labels", 1))

    assert torch.equal(at(0.0), labels)
    few, many = at(0.2), at(0.6)
    for share, found in ((0.2, few), (0.6, many)):
        assert float((found != labels).double().mean()) == pytest.approx(share, abs=0.025)
        assert 0 <= int(found.min()) and int(found.max()) < 5
    assert torch.equal(few[few != labels], many[few != labels])  # the wrong ones of the smaller share stay wrong
    moved = (many - labels)[many != labels] % 5
    assert moved.bincount(minlength=5)[1:].double().div(len(moved)).tolist() == pytest.approx([0.25] * 4, abs=0.03)


def test_label_noise_is_training_on_wrong_labels(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = finetune.finetune(dataclasses.replace(RECIPE, label_noise=0.5, seed=3), tiny, "cpu", tmp_path / "a")
    task = load_task(RECIPE.task)
    wrong = batches.mislabel(task.train.labels, len(task.classes), 0.5, batches.generator("labels", 3))
    changed = dataclasses.replace(task, train=Split(task.train.images, wrong))
    monkeypatch.setattr(loop, "load_task", lambda name, size: changed)
    by_hand = finetune.finetune(dataclasses.replace(RECIPE, seed=3), tiny, "cpu", tmp_path / "b")
    assert same(noisy.theta, by_hand.theta)
    assert (noisy.train_loss, noisy.train_accuracy) == (by_hand.train_loss, by_hand.train_accuracy)


@pytest.mark.parametrize("optimizer", ["adamw", "sam"])
def test_divergence_names_task_step_and_remedy(
    optimizer: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def poisoned(images: Tensor, *others: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return augment.augment(images, *others) * (math.nan if calls == 4 else 1)

    monkeypatch.setattr(loop, "augment", poisoned)
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer, rho=0.05 if optimizer == "sam" else 0.0)
    with pytest.raises(FloatingPointError, match="'warm' with .* not finite at step 3: lower lr .* or rho"):
        finetune.finetune(recipe, tiny, "cpu", tmp_path)
    assert not list((tmp_path / "finetune").glob("[!.]*"))  # nothing half-done stays


# ---- options of the loop


def train(tiny: Any, folder: Path, **change: Any) -> Finetuned:
    return finetune.finetune(dataclasses.replace(RECIPE, **change), tiny, "cpu", folder)


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first)


def test_accumulated_gradients_are_those_of_the_whole_batch(tiny: Any, tmp_path: Path) -> None:
    whole = train(tiny, tmp_path)
    shared = train(tiny, tmp_path, micro_batch=5, shared_climb=True)  # 5 + 5 + 5 + 1
    own = train(tiny, tmp_path, micro_batch=5)
    assert difference(whole.theta, shared.theta) < 1e-5 < difference(whole.theta, own.theta)
    assert shared.log["loss"].tolist() == pytest.approx(whole.log["loss"].tolist(), rel=1e-4)


def test_the_best_weights_are_those_of_the_best_look_at_the_validation_split(tiny: Any, tmp_path: Path) -> None:
    done = train(tiny, tmp_path, steps=13, validate_every=4, lr=0.3)
    looks = done.log.dropna(subset="validation_accuracy")
    assert looks["step"].tolist() == [3, 7, 11, 12] and done.best is not None
    task = load_task("warm")
    head = zero_shot_head(tiny, task)
    best = looks["validation_accuracy"].max()
    assert evaluate.accuracy(tiny.encoder, done.best, task.validation, head) == best
    assert evaluate.accuracy(tiny.encoder, done.theta, task.validation, head) == looks["validation_accuracy"].iloc[-1]
    logits = evaluate.logits(tiny.encoder, done.theta, task.validation.images, head)
    loss = F.cross_entropy(logits, task.validation.labels).item()
    assert looks["validation_loss"].iloc[-1] == pytest.approx(loss, rel=1e-6)
    again = train(tiny, tmp_path, steps=13, validate_every=4, lr=0.3)
    assert again.best is not None and same(done.best, again.best)
    assert same(done.theta, train(tiny, tmp_path, steps=13, lr=0.3).theta)  # looking changes nothing


@pytest.mark.parametrize("average", ["ema", "swa"])
def test_averaged_weights_are_the_average_of_the_path(
    average: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path: list[dict[str, Tensor]] = []
    step = sam.SAM.step

    def spy(self: Any, *closures: Any, shared: bool) -> Tensor:
        loss = step(self, *closures, shared=shared)
        path.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
        return loss

    monkeypatch.setattr(sam.SAM, "step", spy)
    done = train(tiny, tmp_path, average=average, decay=0.9 if average == "ema" else 0.99)
    own = path[:12]
    if average == "swa":  # before the average begins, a look sees the weights themselves
        looked = train(tiny, tmp_path, average="swa", validate_every=2).log["validation_loss"].dropna()
        plain = train(tiny, tmp_path, validate_every=2).log["validation_loss"].dropna()
        assert looked.iloc[:4].equals(plain.iloc[:4]) and not looked.equals(plain)
        short = train(tiny, tmp_path, average="swa", steps=2)
        assert same(short.theta, train(tiny, tmp_path, steps=2).theta)
    wanted = {name: w.clone() for name, w in own[0 if average == "ema" else 9].items()}
    for name in wanted:
        for theta in own[1:] if average == "ema" else ():
            wanted[name] = 0.9 * wanted[name] + 0.1 * theta[name]
        if average == "swa":
            wanted[name] = torch.stack([theta[name] for theta in own[9:]]).mean(0)  # of 12 steps
    assert difference(wanted, done.theta) < 1e-6 < difference(own[-1], done.theta)


def test_climbing_seldom_or_in_few_parameters_is_another_algorithm(tiny: Any, tmp_path: Path) -> None:
    seldom = train(tiny, tmp_path, every=5, diagnose=True)
    assert (seldom.log["eps_norm"] > 0).tolist() == [step % 5 == 0 for step in range(12)]
    assert Recipe("warm", "sam", 12, 0.1, every=5).gradients == 12 + 3
    assert RECIPE.gradients == 24 and Recipe("warm", "adamw", 12).gradients == 12
    asam = {"optimizer": "asam", "rho": 0.5}
    one, other, third = (train(tiny, tmp_path, **asam, **x) for x in ({}, {"eta": 0.1}, {"scale_biases": False}))
    assert not same(one.theta, other.theta) and not same(one.theta, third.theta)
    with pytest.raises(ValueError, match="only must name at least one parameter"):
        train(tiny, tmp_path, norms_only=True)  # the double has no norm layer


def test_fp16_scales_its_loss_and_agrees_with_fp32(tiny: Any, tmp_path: Path) -> None:
    half, exact = train(tiny, tmp_path, precision="fp16"), train(tiny, tmp_path)
    assert half.log["loss"].tolist() == pytest.approx(exact.log["loss"].tolist(), rel=0.05)
    assert half.log["grad_norm"].tolist() == pytest.approx(exact.log["grad_norm"].tolist(), rel=0.1)
    assert half.skipped == 0 and all(w.dtype == torch.float32 for w in half.theta.values())


def _worker(rank: int, tiny: Any, recipes: list[Recipe], folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for recipe in recipes:
        finetune.finetune(recipe, tiny, "cpu", folder)
    _overflow_on_one(rank)
    torch.distributed.destroy_process_group()


def _overflow_on_one(rank: int) -> None:
    """A gradient that overflows in one process only: all skip the step, and scales and weights stay equal."""
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
    scaler = torch.amp.GradScaler("cpu")
    optimizer = sam.SAM(torch.optim.SGD(model.parameters(), 0.1), 0.1, model=model, scaler=scaler)
    for step in range(3):

        def closure(step: int = step) -> Tensor:
            loss = model(torch.full((2, 3), 1.0 + rank)).square().mean()
            scaler.scale(loss * (math.inf if rank == step == 1 else 1)).backward()
            return loss

        optimizer.step(closure)
    mine = torch.cat([torch.tensor([scaler.get_scale()]), *(p.detach().flatten() for p in model.parameters())])
    both = [torch.empty_like(mine) for _ in range(2)]
    torch.distributed.all_gather(both, mine)
    assert torch.equal(*both) and mine[0] == 2.0**15 and optimizer.skipped == 1


def test_two_processes_compute_what_one_computes_in_two_parts(tiny: Any, tmp_path: Path) -> None:
    """Unsynchronised climbs are m-sharpness over the processes, synchronised ones SAM on the whole batch."""
    changes: list[dict[str, Any]] = [{}, {"shared_climb": True}, {"micro_batch": 4, "every": 2, "average": "ema"}]
    two = [dataclasses.replace(RECIPE, diagnose=True, **change) for change in changes]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_worker, (tiny, two, tmp_path / "two", port), nprocs=2)
    thetas = {}
    for file in (tmp_path / "two").glob("finetune/*/recipe.json"):
        recipe = Recipe(**json.loads(file.read_text())["recipe"])
        thetas[recipe] = load_file(file.with_name("theta.safetensors"))
        one = finetune.finetune(
            dataclasses.replace(recipe, micro_batch=recipe.micro_batch or 8), tiny, "cpu", tmp_path / "one"
        )
        assert difference(one.theta, thetas[recipe]) < 1e-5
        log = pd.read_parquet(file.with_name("log.parquet"))
        for column in (*loop.COLUMNS, *sam.MEANS):
            if column == "cosine" and not recipe.shared_climb:
                continue  # a process's own first gradient beside the averaged second one
            if column == "grad_norm" and recipe.every > 1:
                continue  # a step without a climb averages over the processes at once
            assert log[column].tolist() == pytest.approx(one.log[column].tolist(), rel=1e-3), column
    assert set(thetas) == set(two) and difference(thetas[two[0]], thetas[two[1]]) > 1e-4


# ---- cache


def test_a_recipe_is_trained_once(tiny: Any, tmp_path: Path, trained: list[Recipe]) -> None:
    first = finetune.finetune(RECIPE, tiny, "cpu", tmp_path)
    again = finetune.finetune(RECIPE, tiny, "cpu", tmp_path)
    assert trained == [RECIPE]
    assert same(first.theta, again.theta) and first.log.equals(again.log)
    assert (first.seconds, first.train_loss) == (again.seconds, again.train_loss)


def test_each_cause_of_the_weights_has_an_entry(tiny: Any, tmp_path: Path, trained: list[Recipe]) -> None:
    variants = [
        dataclasses.replace(RECIPE, **change)
        for change in ({}, {"seed": 1}, {"rho": 0.1}, {"tasks": ("cool",)}, {"steps": 13}, {"n_train": 20})
    ]
    done = finetune_many(variants, tiny, "cpu", tmp_path, jobs=1)
    assert trained == variants
    assert not any(same(a.theta, b.theta) for i, a in enumerate(done) for b in done[:i])
    finetune.finetune(RECIPE, dataclasses.replace(tiny, fingerprint="other"), "cpu", tmp_path)
    assert len(trained) == len(variants) + 1


def test_the_key_follows_code_but_not_prose() -> None:
    source = 'def f(x):\n    """Doc."""\n    return x  # comment\n'
    prose = 'def f(x):\n    """Another text."""\n\n    # more\n    return x\n'
    assert keys.without_prose(source) == keys.without_prose(prose)
    assert keys.without_prose(source) != keys.without_prose(source.replace("return x", "return -x"))


def test_the_loop_which_names_results_uses_no_estimates_and_no_bookkeeping() -> None:
    program = "import samlib.train.loop, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    used = {name.removeprefix("samlib.train.") for name in done.stdout.split() if name.startswith("samlib.train.")}
    assert used == {"loop", "sam", "recipe", "schedule", "beside", "distributed"}


@pytest.mark.parametrize("name", ["theta.safetensors", "log.parquet", "recipe.json"])
@pytest.mark.parametrize("harm", ["truncate", "delete"])
def test_a_damaged_cache_file_is_named(name: str, harm: str, tiny: Any, tmp_path: Path) -> None:
    finetune.finetune(RECIPE, tiny, "cpu", tmp_path)
    (path,) = tmp_path.glob(f"finetune/*/{name}")
    if harm == "truncate":
        path.write_bytes(path.read_bytes()[:40])
    else:
        path.unlink()
    with pytest.raises(ValueError, match=f"cannot read .*{name}: .*delete"):
        finetune.finetune(RECIPE, tiny, "cpu", tmp_path)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "adamw", "rho": 0.0},
        {"optimizer": "asam", "rho": 0.5},
        {"every": 5},
        {"optimizer": "rwp"},
        {"precision": "fp16"},
        {"average": "swa", "validate_every": 3},
    ],
    ids=str,
)
def test_an_interrupted_run_resumes_bit_for_bit(
    change: dict[str, Any], tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(RECIPE, **change)
    whole = finetune.finetune(recipe, tiny, "cpu", tmp_path / "whole")
    monkeypatch.setattr(beside, "CHECKPOINT_SECONDS", -1.0)  # after every step
    steps: list[int] = []

    def breaking(n: int, batch_size: int, seed: int, step: int) -> Tensor:
        if step == 7 and 7 not in steps:
            steps.append(step)
            raise Interrupted
        steps.append(step)
        return batches.batch_indices(n, batch_size, seed, step)

    monkeypatch.setattr(loop, "batch_indices", breaking)
    with pytest.raises(Interrupted):
        finetune.finetune(recipe, tiny, "cpu", tmp_path / "broken")
    resumed = finetune.finetune(recipe, tiny, "cpu", tmp_path / "broken")
    assert steps == [*range(8), *range(7, 12)]  # nothing is done twice
    assert same(whole.theta, resumed.theta) and whole.log.equals(resumed.log)
    assert [path.name for path in (tmp_path / "broken" / "finetune").iterdir()] == [
        path.name for path in (tmp_path / "whole" / "finetune").iterdir()
    ]


def _killed(tiny: Any, recipe: Recipe, folder: Path, step: int, place: str) -> None:
    """Fine-tune and die, like a process that runs out of memory, at one place of one step."""
    beside.CHECKPOINT_SECONDS = -1.0  # a checkpoint after every step
    now = -1

    def die_at(name: str, half: Path | None = None) -> None:
        if place == name and now >= step:
            if half:
                half.write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)

    def indices(n: int, batch_size: int, seed: int, coming: int) -> Tensor:
        nonlocal now
        now = coming
        die_at("before the step")
        return batches.batch_indices(n, batch_size, seed, now)

    def restore(optimizer: sam.SAM) -> None:
        die_at("at w + eps")
        restored(optimizer)

    def checkpointing(tensors: Any, path: Path, metadata: dict[str, str]) -> None:
        die_at("writing the checkpoint", path)
        save_file(tensors, path, metadata)

    def writing(tensors: Any, path: Path, metadata: dict[str, str]) -> None:
        die_at("writing the result", path)
        save_file(tensors, path, metadata)

    restored = sam.SAM.restore
    sam.SAM.restore = restore  # type: ignore[method-assign]
    loop.batch_indices, checkpoint.save_file, result.save_file = indices, checkpointing, writing
    finetune.finetune(recipe, tiny, "cpu", folder)


@pytest.mark.slow
def test_a_run_killed_fourteen_times_ends_in_the_same_bits(tiny: Any, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, steps=40, average="ema", validate_every=7)
    whole = finetune.finetune(recipe, tiny, "cpu", tmp_path / "whole")
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["samlib.train.finetune", "tests.conftest"])
    steps = torch.randperm(39, generator=torch.Generator().manual_seed(1))[:12].sort().values.tolist()
    places = ("before the step", "at w + eps", "writing the checkpoint")
    deaths = [(step, places[i % 3]) for i, step in enumerate(steps)] + 2 * [(39, "writing the result")]
    for step, place in deaths:
        child = processes.Process(target=_killed, args=(tiny, recipe, tmp_path / "killed", step, place))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        (saved,) = (tmp_path / "killed" / "finetune").glob("*.partial.safetensors")
        with safe_open(saved, "pt") as file:
            done = json.loads(file.metadata()["facts"])["optimizer"]["steps"]
        assert done == step  # it died where it was meant to, with the steps before it saved
    resumed = finetune.finetune(recipe, tiny, "cpu", tmp_path / "killed")
    assert same(whole.theta, resumed.theta) and whole.log.equals(resumed.log)
    assert whole.best is not None and resumed.best is not None and same(whole.best, resumed.best)


def test_a_checkpoint_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    def state(width: int) -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
        w = torch.ones(width, requires_grad=True)
        optimizer = torch.optim.AdamW([w])
        w.sum().backward()
        optimizer.step()
        return {"w": w}, optimizer

    path = tmp_path / "a.safetensors"
    checkpoint.save(path, "recipe A", *state(3), {"step": 4})
    tensors, optimizer = state(3)
    assert checkpoint.load(path, "recipe A", tensors, optimizer) == {"step": 4}
    for owner, width, message in (("recipe B", 3, "of recipe A, not of recipe B"), ("recipe A", 4, "another model: w")):
        tensors, optimizer = state(width)
        before = tensors["w"].detach().clone()
        with pytest.raises(ValueError, match=message):
            checkpoint.load(path, owner, tensors, optimizer)
        assert torch.equal(tensors["w"], before)
    tensors, optimizer = state(3)
    other = torch.optim.AdamW([torch.ones(7, requires_grad=True)])
    other.load_state_dict(state(7)[1].state_dict())
    checkpoint.save(path, "recipe A", tensors, other, {"step": 4})
    with pytest.raises(ValueError, match="another model: the optimiser's state differs"):
        checkpoint.load(path, "recipe A", tensors, optimizer)
    save_file({"w": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="cannot read"):
        checkpoint.load(path, "recipe A", tensors, optimizer)


def test_a_damaged_checkpoint_is_named(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "CHECKPOINT_SECONDS", -1.0)

    def breaking(n: int, batch_size: int, seed: int, step: int) -> Tensor:
        if step == 2:
            raise Interrupted
        return batches.batch_indices(n, batch_size, seed, step)

    monkeypatch.setattr(loop, "batch_indices", breaking)
    with pytest.raises(Interrupted):
        finetune.finetune(RECIPE, tiny, "cpu", tmp_path)
    (path,) = tmp_path.glob("finetune/*.partial.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot read .*\.partial\.safetensors: .*delete"):
        finetune.finetune(RECIPE, tiny, "cpu", tmp_path)


def test_processes_give_the_weights_of_a_serial_run_in_the_order_of_the_recipes(
    tiny: Any, tmp_path: Path, trained: list[Recipe]
) -> None:
    recipes = [dataclasses.replace(RECIPE, seed=seed) for seed in (1, 0, 1)]
    serial = finetune_many(recipes, tiny, "cpu", tmp_path / "serial", jobs=1)
    assert trained == recipes[:2]  # the third equals the first
    parallel = finetune_many(recipes, tiny, "cpu", tmp_path / "parallel", jobs=2)
    assert [done.recipe for done in parallel] == recipes
    assert all(same(a.theta, b.theta) for a, b in zip(serial, parallel, strict=True))
    with pytest.raises(ValueError, match="jobs must be"):
        finetune_many(recipes, tiny, "cpu", tmp_path, jobs=0)


def test_what_is_trained_together_need_not_fit_into_the_memory_together(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("nothing is to be read")

    with monkeypatch.context() as patch:
        patch.setattr(result, "read", read)
        wanted = [dataclasses.replace(RECIPE, seed=seed) for seed in (1, 0, 1)]
        folders = train_many(wanted, tiny, "cpu", tmp_path, jobs=1)
    assert folders[0] == folders[2] != folders[1]
    for recipe, folder in zip(wanted, folders, strict=True):
        done = finetune.finetune(recipe, tiny, "cpu", tmp_path)
        assert same(load_file(folder / "theta.safetensors"), done.theta)


def test_unknown_task_is_a_key_error(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="unknown task 'cold'"):
        finetune.finetune(dataclasses.replace(RECIPE, tasks="cold"), tiny, "cpu", tmp_path)


# ---- several tasks at once


def test_tasks_take_turns_and_the_loss_is_their_mean(tiny: Any, tmp_path: Path) -> None:
    recipe = Recipe(("warm", "cool"), "adamw", steps=2, lr=1e-2, warmup=0.0, batch_size=16, weight_decay=0.0)
    assert recipe.tasks == ("warm", "cool")
    done = finetune.finetune(recipe, tiny, "cpu", tmp_path)
    theta = {name: w.clone().requires_grad_() for name, w in weights_of(tiny.encoder).items()}
    optimizer = torch.optim.AdamW(theta.values(), 1e-2, weight_decay=0.0)
    heads = {name: zero_shot_head(tiny, load_task(name)) for name in recipe.tasks}
    for step, name in enumerate(recipe.tasks):  # by hand: first a batch of the one, then one of the other
        train = load_task(name).train
        index = batches.batch_indices(len(train), 16, 0, 0)
        batch = augment.augment(train.images[index], batches.generator("augment", 0, step))
        outputs = torch.func.functional_call(tiny.encoder, theta, (batch,)) @ heads[name].T
        optimizer.param_groups[0]["lr"] = schedule.lr_at(step, 2, 1e-2, 0.0)
        optimizer.zero_grad()
        F.cross_entropy(outputs, train.labels[index]).backward()
        torch.nn.utils.clip_grad_norm_(theta.values(), 1.0)
        optimizer.step()
    for name, w in theta.items():
        torch.testing.assert_close(done.theta[name], w.detach(), rtol=1e-5, atol=1e-6)
    each = [
        F.cross_entropy(evaluate.logits(tiny.encoder, done.theta, train.images, heads[name]), train.labels).item()
        for name in recipe.tasks
        for train in [load_task(name).train]
    ]
    assert done.train_loss == pytest.approx(sum(each) / 2, rel=1e-5)


def test_a_model_of_several_tasks_resumes_in_its_turn(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    recipe = Recipe(("warm", "cool"), "sam", steps=9, rho=0.05, lr=1e-2, batch_size=16)
    whole = finetune.finetune(recipe, tiny, "cpu", tmp_path / "whole")
    monkeypatch.setattr(beside, "CHECKPOINT_SECONDS", 0.0)
    calls = 0
    save = checkpoint.save

    def stop_after_the_fifth(*arguments: Any) -> None:
        nonlocal calls
        save(*arguments)
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", stop_after_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        finetune.finetune(recipe, tiny, "cpu", tmp_path / "cut")
    monkeypatch.setattr(checkpoint, "save", save)
    assert same(finetune.finetune(recipe, tiny, "cpu", tmp_path / "cut").theta, whole.theta)


def test_a_task_of_the_readers_may_not_have_a_plus_in_its_name(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "a+b").mkdir()
    (tmp_path / "a+b" / "train-00000-of-00001.parquet").touch()
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"'a\+b' in SAMLIB_DATA has a \+ in its name"):
        catalogue.known()
