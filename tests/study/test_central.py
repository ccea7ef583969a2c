from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from samlib.measure.intervals import paired
from samlib.notebook import page
from samlib.notebook.run import Run
from samlib.study import arms, campaign, central, evidence, publish
from samlib.study.arms import ARMS, Arm
from samlib.study.central import ROWS
from samlib.study.scoring import at_best_lambda, bench


def result(mean: float) -> dict[str, Any]:
    return {row: {"mean": mean + i / 10, "normalised": mean + i / 10} for i, row in enumerate(ROWS)}


def test_arms_differ_in_what_they_say_and_in_nothing_else(run: Run) -> None:
    plain, twice, sam, asam = (arms.recipes(run, arm, 5) for arm in ARMS.values())
    p = run.preset
    assert [r.task for r in plain] == ["warm", "cool"]
    for a, b, c, d in zip(plain, twice, sam, asam, strict=True):
        assert b == dataclasses.replace(a, steps=2 * p.steps)
        assert c == dataclasses.replace(a, optimizer="sam", rho=p.rho_sam)
        assert d == dataclasses.replace(a, optimizer="asam", rho=p.rho_asam)
        assert (a.steps, a.seed, a.optimizer, a.rho) == (p.steps, 5, "adamw", 0)
    assert arms.recipes(run, ARMS["SAM"], 5, length=2.0)[0].steps == 2 * p.steps
    assert list(ARMS) == ["AdamW", "AdamW, 2x steps", "SAM", "ASAM"] and str(arms.JOINT) == "AdamW, all tasks"
    with pytest.raises(ValueError, match="optimizer must be one of adamw, sam, asam, not 'Adam'"):
        Arm("Adam")
    with pytest.raises(ValueError, match="adamw has no radius: rho must be None, not 0.25"):
        Arm("adamw", 0.25)


def test_measure_agrees_with_its_parts_and_is_kept(run: Run, tiny: Any) -> None:
    found = central.measure(run, ARMS["AdamW"], 0)
    assert set(ROWS) <= set(found) and found["single"]["normalised"] == 1
    for row in ROWS:
        accuracies = found[row]["accuracy"]
        assert list(accuracies) == ["warm", "cool"] and found[row]["mean"] == sum(accuracies.values()) / 2
        ratios = [accuracies[t] / found["single"]["accuracy"][t] for t in accuracies]
        assert found[row]["normalised"] == pytest.approx(sum(ratios) / 2)
    merged = found["task arithmetic"]
    assert merged["curve"][run.preset.lambdas.index(merged["lam"])] == max(merged["curve"])
    assert list(found["xi"]) == ["warm, cool"] and 0 <= found["xi"]["warm, cool"] <= 2
    files = sorted((run.cache / "finetune").iterdir())
    assert len(files) == 2
    assert central.measure(run, ARMS["AdamW"], 0) == found
    assert sorted((run.cache / "finetune").iterdir()) == files
    other = central.measure(run, ARMS["AdamW"], 1)  # another recipe is another result
    assert other["tau_norm"] != found["tau_norm"]
    (same,) = campaign.measure_many(central.measure, [(run, ARMS["AdamW"], 0, 1.0)])
    assert same == campaign.identity(run, ARMS["AdamW"], 0) | found
    assert (same["arm"], same["seed"], same["steps"]) == ("AdamW", 0, run.preset.steps)


def test_table_and_gains_are_student_intervals() -> None:
    results = {"AdamW": [result(0.1), result(0.2), result(0.6)], "SAM": [result(0.2), result(0.4), result(0.6)]}
    row = central.table(results).loc[("AdamW", "averaging")]
    assert row["mean"] == pytest.approx(0.4) and row["n"] == 3
    low, high = stats.t.interval(0.95, 2, loc=0.4, scale=stats.sem([0.2, 0.3, 0.7]))
    assert (row["low"], row["high"]) == (pytest.approx(low), pytest.approx(high))
    gain = central.gains(results, "AdamW").loc[("SAM", "TIES")]
    low, high = stats.t.interval(0.95, 2, loc=0.1, scale=stats.sem([0.1, 0.2, 0.0]))
    assert (gain["mean"], gain["low"], gain["high"]) == (pytest.approx(0.1), pytest.approx(low), pytest.approx(high))


def test_published_takes_complete_seeds_of_the_fullest_then_longest_length(run: Run) -> None:
    assert evidence.published(run) == {} == evidence.published_lengths(run)
    done = {
        (10, arm, seed)
        for arm in ARMS
        for seed in (0, 1)
        if (arm, seed) != ("ASAM", 1)  # seed 1 is not complete
    } | {(steps, arm, 7) for arm in ARMS for steps in (40, 160)}
    runs = [{"steps": s, "arm": a, "seed": k, "mark": f"{s} {a} {k}"} for s, a, k in sorted(done, reverse=True)]
    dataclasses.replace(run, notebook="central", preset=dataclasses.replace(run.preset, name="published")).publish(
        {"zero-shot": {}, "runs": runs}
    )
    lengths = evidence.published_lengths(run)
    assert list(lengths) == [10, 40, 160]
    assert [r["mark"] for r in lengths[10]["SAM"]] == ["10 SAM 0"]
    assert {arm: [r["mark"] for r in found] for arm, found in evidence.published(run).items()} == {
        arm: [f"160 {arm} 7"] for arm in ARMS
    }
    assert evidence.published(run, steps=10) == lengths[10] and evidence.published(run, steps=11) == lengths[160]


def test_publishing_goes_on_where_it_stopped_and_replaces_other_recipes(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int, float]] = []

    def measured(_: Any, wanted: list[campaign.Wanted]) -> list[dict[str, Any]]:
        asked.extend((str(arm), seed, length) for _, arm, seed, length in wanted)
        return [campaign.identity(*one) | {"rho": one[0].preset.rho_sam} for one in wanted]

    monkeypatch.setattr(evidence, "measure_many", measured)
    monkeypatch.setattr(evidence, "zero_shot", lambda run: {})
    monkeypatch.setattr("sys.argv", ["publish", "central", "--preset", "smoke"])
    here = dataclasses.replace(run, notebook="central", preset=dataclasses.replace(run.preset, lengths=(1.0, 0.5)))
    monkeypatch.setattr(publish, "begin", lambda *_: here)
    publish.main()
    everything = [(arm, 3, length) for length in (1.0, 0.5) for arm in ARMS]
    assert asked == everything
    publish.main()
    assert asked == everything  # all of it was there
    monkeypatch.setattr("sys.argv", ["publish", "central", "--preset", "smoke", "--lengths", "0.5"])
    publish.main()
    assert asked == everything
    monkeypatch.setattr("sys.argv", ["publish", "central", "--preset", "smoke", "--lengths", "0.25", "--seeds", "3"])
    publish.main()
    assert asked == [*everything, *((arm, 3, 0.25) for arm in ARMS)]
    del asked[len(everything) :]
    monkeypatch.setattr("sys.argv", ["publish", "central", "--preset", "smoke"])
    here = dataclasses.replace(here, preset=dataclasses.replace(here.preset, rho_sam=0.5))
    publish.main()
    assert asked[len(everything) :] == [("SAM", 3, 1.0), ("SAM", 3, 0.5)]  # the one arm whose recipes changed
    runs = here.published_values("central.smoke")["runs"]
    assert len(runs) == len(everything) + len(ARMS) and {r["rho"] for r in runs if r["arm"] == "SAM"} == {0.005, 0.5}


def test_verdict_follows_the_paired_interval() -> None:
    base = [0.5, 0.6, 0.9]
    assert page.verdict(paired([0.6, 0.71, 1.0], base)) == "higher than"
    assert page.verdict(paired([0.4, 0.49, 0.8], base)) == "lower than"
    assert page.verdict(paired([0.6, 0.5, 0.9], base)) == "not distinguishable from"
    assert page.verdict(paired([0.6], [0.5])) == "not comparable (one seed) with"


def test_compare_puts_one_run_beside_the_published_seeds() -> None:
    frame = page.compare({"a": 1.0, "b": 2.0}, {"a": [0.0, 1.0, 2.0]})
    assert frame.loc["a", "published"] == 1 and frame.loc["a", "low"] < 0 and frame.loc["a", "seeds"] == 3
    assert frame.loc["b", "yours"] == 2 and frame.loc["b"].isna().sum() == 3 and frame.loc["b", "seeds"] == 0


def test_lines_of_the_readme_take_a_folder_of_images_to_a_merged_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(0)
    for split, n in (("train", 30), ("test", 8)):
        for k, name in enumerate(("robin", "wren")):
            folder = tmp_path / "data" / "birds" / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = draw.integers(0, 100, (50, 70, 3), dtype=np.uint8)
                pixels[..., 2 * k] += 150
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("SAMLIB_CACHE", str(tmp_path / "cache"))
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(from samlib import begin\n.*?)```", readme, re.S)
    assert len(code.strip().splitlines()) <= 5
    exec(code.replace('"laptop"', '"smoke"'), {})  # laptop takes minutes
    printed = ast.literal_eval(capsys.readouterr().out.strip().splitlines()[-1])
    assert set(printed["accuracy"]) == {"birds", "digits"} and 0 < printed["normalised"] <= 2
    assert len(list((tmp_path / "cache" / "finetune").glob("*/theta.safetensors"))) == 2


def test_a_model_that_is_never_right_has_no_normalised_accuracy(run: Run) -> None:
    b = bench(run)
    with pytest.raises(ValueError, match="the model of cool gets no validation image right: raise steps"):
        at_best_lambda(b, b.theta_0, (0.0, 1.0), [0.5, 0.0])
