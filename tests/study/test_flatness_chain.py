from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from samlib.data.tasks import Split, subset
from samlib.measure.intervals import Estimate
from samlib.model.evaluate import losses
from samlib.model.theta import flat, weights_of
from samlib.notebook import page
from samlib.notebook.presets import PRESETS
from samlib.notebook.run import Run
from samlib.study import arms, campaign, evidence, flatness_chain, pairs, publish, where_sam_helps
from samlib.study.arms import ARMS, Arm
from samlib.study.scoring import Bench, bench
from samlib.train.finetune import finetune_many


def test_what_is_measured_of_a_model_agrees_with_dense_algebra(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    split = Split(torch.rand(30, 3, 2, 2, dtype=torch.float64), torch.arange(30) % 2)
    head = torch.randn(2, 3, dtype=torch.float64)
    theta_t = weights_of(encoder)
    theta_m = {name: w + 0.05 * torch.randn_like(w) for name, w in reversed(theta_t.items())}
    preset = dataclasses.replace(PRESETS["smoke"], tasks=("one",), n_hessian=30)
    b = Bench(preset, encoder, theta_t, [head], [split], [split], [split])
    found = flatness_chain._of_task(b, 0, theta_t, theta_m)

    def loss(v: torch.Tensor) -> torch.Tensor:
        names = sorted(theta_t)
        parts = v.split([theta_t[name].numel() for name in names])
        weights = {name: part.view(theta_t[name].shape) for name, part in zip(names, parts, strict=True)}
        return F.cross_entropy(functional_call(encoder, weights, (split.images,)) @ head.T, split.labels)

    w, eps = flat(theta_t), flat(theta_m) - flat(theta_t)
    H, g = torch.func.hessian(loss)(w), torch.func.grad(loss)(w)
    values, vectors = torch.linalg.eigh(H)
    assert found["eigenvalues"] == pytest.approx(values.flip(0)[: flatness_chain.TOP].tolist(), rel=1e-2)
    assert abs(found["trace"] - float(H.trace())) < 4 * found["trace error"]
    assert found["along"] == pytest.approx(float(eps @ H @ eps / (eps @ eps)), rel=1e-6)
    assert found["gap_train"] == pytest.approx(float(loss(w + eps) - loss(w)), rel=1e-6)
    assert found["test first"] == pytest.approx(found["first"])  # the same images here
    top = vectors[:, -flatness_chain.TOP :]
    for name, d in {"merge": eps, "SAM": g, "ASAM": w**2 * g}.items():
        unit = d / d.norm()
        mine = found["directions"][name]
        assert mine["cosine"] == pytest.approx(float(unit @ eps / eps.norm()), abs=1e-6)
        assert mine["energy"] == pytest.approx(float((top.T @ unit).square().sum()), abs=2e-2)
        rises = [float(loss(w + share * eps.norm() * unit) - loss(w)) for share in flatness_chain.SHARES]
        assert mine["rise"] == pytest.approx(rises, rel=1e-6)
    assert found["directions"]["merge"]["rise"][-1] == pytest.approx(found["gap_train"])


def test_flatness_of_an_arm(run: Run) -> None:
    found = flatness_chain.measure(run, ARMS["AdamW"], 0)["tasks"]
    fast = where_sam_helps.measure(run, ARMS["AdamW"], 0)
    assert list(found) == ["warm", "cool"]
    for task, values in found.items():
        assert values["gap_average"] == pytest.approx(fast["gap_average"][task], abs=1e-6)
        assert values["norm"] == pytest.approx(fast["tau_norm"][task], rel=1e-5)
        assert values["gap_train"] == pytest.approx(values["first"] + values["second"] + values["rest"])
        lost = fast["single"]["accuracy"][task] - fast["averaging"]["accuracy"][task]
        assert values["test accuracy lost"] == pytest.approx(lost)
    assert found["warm"]["cosine"] == pytest.approx(found["cool"]["cosine"])  # two tasks have one angle
    evidence.publish_runs(run, "flatness_chain", [(run, ARMS["AdamW"], 0, 1.0)])
    line = flatness_chain.table(run.published_values("demo.smoke")["runs"]).set_index("task").loc["cool"]
    assert (line["arm"], line["rho"], line["seed"]) == ("AdamW", 0.0, 0)
    assert line["gap_average"] == found["cool"]["gap_average"] != line["gap_train"] == found["cool"]["gap_train"]
    assert line["quadratic"] == pytest.approx(line["gap_train"] - line["rest"])
    assert line["points lost"] == 100 * found["cool"]["test accuracy lost"]
    assert line["top eigenvalue"] == found["cool"]["eigenvalues"][0]


def test_a_radius_in_an_arms_name(run: Run) -> None:
    assert [r.rho for r in arms.recipes(run, Arm("sam", 0.25), 0)] == [0.25, 0.25]
    assert arms.recipes(run, Arm("asam", 0.25), 0)[0].optimizer == "asam"
    own = Arm("sam", run.preset.rho_sam)
    assert str(own) == "SAM, rho 0.005" and arms.recipes(run, own, 3) == arms.recipes(run, ARMS["SAM"], 3)


def test_regimes_train_what_they_say_and_are_published_apart(run: Run) -> None:
    preset = dataclasses.replace(run.preset, regimes=((1.0, 60, 0.0), (0.5, 60, 0.0), (1.0, 60, 0.5)))
    run = dataclasses.replace(run, preset=preset)
    arms = where_sam_helps.arms(run)
    assert list(arms) == ["AdamW", "AdamW, 2x steps", "SAM, rho 0.005"]
    for _ in range(2):  # the second time nothing is left to do
        for wanted in where_sam_helps.plan(run, 0):
            evidence.publish_runs(run, "where_sam_helps", wanted)
    runs = run.published_values("demo.smoke")["runs"]
    told = [(r["arm"], r["steps"], r["recipes"][0]["label_noise"], r["recipes"][0]["steps"]) for r in runs]
    assert told == [
        (arm, steps, noise, 2 * steps if "2x" in arm else steps)
        for steps, noise in ((10, 0.0), (5, 0.0), (10, 0.5))
        for arm in arms
    ]
    table = where_sam_helps.gains(runs)
    assert len(table) == 3 * 2 * 2  # regimes, baselines, tasks
    line = table[(table.label_noise == 0.5) & (table.base == "AdamW, 2x steps") & (table.task == "cool")].iloc[0]
    sam, twice = runs[8], runs[7]
    assert line["gap_average"] == sam["gap_average"]["cool"] - twice["gap_average"]["cool"]
    assert line["single"] == pytest.approx(
        100 * (sam["single"]["accuracy"]["cool"] - twice["single"]["accuracy"]["cool"])
    )
    assert line["rho"] == 0.005 and not math.isnan(line["normalised"])


def test_pairs_are_what_their_parts_say(run: Run, tiny: Any) -> None:
    found = pairs.measure(run, ARMS["AdamW"], 0)["pairs"]
    assert list(found) == ["warm, cool"]
    values = found["warm, cool"]
    done = [d.theta for d in finetune_many(arms.recipes(run, ARMS["AdamW"], 0), tiny, "cpu", run.cache)]
    b = bench(run)
    n = run.preset.n_hessian
    assert list(values["blocks"]) == ["hidden", "out"]
    # the first layer is linear in its weights, and its features are taken before the bend
    assert values["blocks"]["hidden"]["distance"] == pytest.approx(0, abs=1e-6)
    assert 0 < values["blocks"]["hidden"]["baseline"]
    middle = {name: (w + done[1][name]) / 2 for name, w in done[0].items()}
    seen = [subset(split, n) for split in b.trains]

    for place, theta_ in ((0, done[0]), (2, middle), (-1, done[1])):
        expected = losses(tiny.encoder, theta_, seen, b.heads).tolist()
        assert [task[place] for task in values["losses"]] == pytest.approx(expected, abs=1e-6)
    vectors = [flat(theta_) for theta_ in done]
    assert values["distance"] == pytest.approx(float((vectors[0] - vectors[1]).norm()), rel=1e-5)


def test_a_command_measures_what_is_missing_seed_after_seed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def measured(_: Any, wanted: list[campaign.Wanted]) -> list[dict[str, Any]]:
        asked.extend((within.preset.n_train, str(arm), seed, length) for within, arm, seed, length in wanted)
        return [campaign.identity(*one) for one in wanted]

    preset = dataclasses.replace(run.preset, regimes=((1.0, 60, 0.0), (0.5, 40, 0.0)), radii=(0.25,))
    here = dataclasses.replace(run, notebook="where_sam_helps", preset=preset)
    monkeypatch.setattr(evidence, "measure_many", measured)
    monkeypatch.setattr(evidence, "zero_shot", lambda run: {})
    monkeypatch.setattr(publish, "begin", lambda *_: here)
    arms = ["AdamW", "AdamW, 2x steps", "SAM, rho 0.25"]
    for seeds in (["1"], ["1", "0"]):
        monkeypatch.setattr("sys.argv", ["publish", "where_sam_helps", "--preset", "smoke", "--seeds", *seeds])
        publish.main()
    assert asked == [(n, arm, s, x) for s in (1, 0) for n, x in ((60, 1.0), (40, 0.5)) for arm in arms]


def test_the_verdict_of_a_claim_follows_its_interval() -> None:
    up, down, around, unknown = (
        Estimate(0.5, low, high, 3) for low, high in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.2), (math.nan, math.nan))
    )
    assert page.claim(up, predicted=1) == page.claim(down, predicted=-1) == "supported"
    assert page.claim(up, predicted=-1) == page.claim(down, predicted=1) == "not supported"
    assert page.claim(around, predicted=1) == page.claim(unknown, predicted=1) == "undecided"
    assert page.claim(Estimate(0.7, 0.5, 0.9, 3), predicted=-1, centre=1.0) == "supported"
    with pytest.raises(ValueError, match="predicted must be"):
        page.claim(up, predicted=0)
