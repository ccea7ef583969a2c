from __future__ import annotations

import dataclasses
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch

from samlib.model import clip
from samlib.model.clip import load_clip
from samlib.model.theta import weights_of
from samlib.train import budget
from samlib.train.budget import Pace
from samlib.train.recipe import Recipe

SAM = Recipe("digits", "sam", 10, rho=0.05, batch_size=16, micro_batch=4, shared_climb=True)


def test_size_counts_what_open_clip_builds() -> None:
    model, encoder, _ = clip.build()
    s = budget.size("testbed")
    assert s.encoder == sum(p.numel() for p in encoder.parameters())
    assert s.whole == sum(p.numel() for p in model.parameters()) and s.pixels == 3 * 32 * 32
    assert budget.size("ViT-B-32/openai").encoder == 87849216  # the published ViT-B/32


def test_operations_of_a_vision_transformer_by_hand() -> None:
    """ViT-B/32: 12 blocks of width 768 over 50 tokens, a patch embedding of 49 patches, a projection to 512."""
    tokens, width = 50, 768
    linear = 12 * width**2 * tokens  # queries, keys, values, output, and two layers four times as wide
    attention = 2 * tokens**2 * width
    by_hand = 2 * (12 * (linear + attention) + 49 * 3 * 32**2 * width + width * 512)
    assert budget.size("ViT-B-32/openai").flops == pytest.approx(by_hand, rel=1e-3)


def test_activations_are_those_that_autograd_keeps() -> None:
    """The same count with real tensors instead of meta tensors."""
    _, encoder, _ = clip.build()
    kept: dict[int, torch.Tensor] = {}
    own = {p.untyped_storage().data_ptr() for p in encoder.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        encoder.train().visual(torch.rand(8, 3, 32, 32))
    found = sum(x.untyped_storage().nbytes() for x in kept.values()) / 8
    assert budget.size("testbed").activations == pytest.approx(found, rel=0.02)


def test_memory_grows_with_what_is_asked_for() -> None:
    def total(**changes: Any) -> int:
        return sum(budget.memory("ViT-B-32/openai", Recipe(**{**vars(SAM), **changes})).values())

    weights = 4 * budget.size("ViT-B-32/openai").encoder
    assert total() - total(optimizer="adamw", rho=0.0) == weights  # the copy to come back to
    assert total(average="ema") - total() == weights
    assert total(micro_batch=8) - total() == 4 * budget.size("ViT-B-32/openai").activations
    assert total(micro_batch=None) == total(micro_batch=16)


@pytest.mark.parametrize(("free", "expected"), [(24e9, 128), (10e9, 128), (6e9, 32), (3.8e9, 8)])
def test_micro_batch_is_the_largest_that_fits(monkeypatch: pytest.MonkeyPatch, free: float, expected: int) -> None:
    monkeypatch.setattr(budget, "free_memory", lambda device: free)
    found = budget.micro_batch("ViT-B-32/openai", 128, "cpu")
    assert found == expected

    def needed(images: int) -> int:
        recipe = Recipe("", "sam", 1, rho=1.0, batch_size=128, micro_batch=images, shared_climb=True)
        return sum(budget.memory("ViT-B-32/openai", recipe).values())

    assert needed(found) <= budget.SHARE * free and (found == 128 or needed(2 * found) > budget.SHARE * free)


def test_seconds_are_gradients_and_what_comes_beside_them() -> None:
    pace = Pace(images=4, gradient=1.0, update=0.1, climb=0.3, adaptive=0.4)
    assert budget.seconds(pace, SAM) == pytest.approx(10 * (2 * 4 * 1.0 + 0.3))
    adamw = Recipe("digits", "adamw", 10, batch_size=16, micro_batch=4)
    assert budget.seconds(pace, adamw) == pytest.approx(10 * (4 * 1.0 + 0.1))
    every_other = Recipe(**{**vars(SAM), "every": 2})
    assert budget.seconds(pace, every_other) == pytest.approx(10 * (1.5 * 4 * 1.0 + 0.3))


def test_pace_leaves_the_model_alone_and_table_adds_up() -> None:
    model = load_clip()
    before, mode = weights_of(model.encoder), model.encoder.training
    arms = {
        "AdamW": [Recipe("digits", "adamw", 5, batch_size=4)] * 3,
        "SAM": [Recipe("flags", "sam", 7, 0.1, batch_size=4)],
    }
    table = budget.table(model, "cpu", arms)
    assert all(torch.equal(w, before[name]) for name, w in weights_of(model.encoder).items())
    assert model.encoder.training is mode and all(p.grad is None for p in model.encoder.parameters())
    assert table["models"].tolist() == [3, 1] and table["gradients"].tolist() == [15, 14]
    assert (table["hours"] > 0).all() and table.loc["SAM", "disk (GB)"] == pytest.approx(0.0045, rel=0.01)
    assert table.loc["SAM", "memory (GB)"] > table.loc["AdamW", "memory (GB)"]
    sentence = budget.summary(model, "cpu", arms)
    assert "4 models of testbed, 29 gradients of 4 images (4 in one pass, fp32)" in sentence


def test_no_image_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "free_memory", lambda device: 10**9)
    with pytest.raises(MemoryError, match="ViT-L-14/openai needs .* GB to be trained, 0.8 GB are free"):
        budget.micro_batch("ViT-L-14/openai", 64, "cpu")
    with pytest.raises(ValueError, match="model must be"):
        budget.size("ViT-Q-32/openai")


def test_used_and_peak_memory_are_this_process() -> None:
    before = budget.used_memory("cpu")
    with mmap.mmap(-1, 200_000_000) as held:  # fresh from the system, whatever the allocator has kept
        held.write(b"x" * len(held))
        assert budget.used_memory("cpu") - before > 0.7 * len(held)
        assert budget.peak_memory("cpu") >= before + 0.7 * len(held)
    assert budget.used_memory("cpu") - before < 0.3 * 200_000_000
    assert budget.free_memory("cpu") > 0


def test_a_container_s_limit_counts(tmp_path: Path) -> None:
    assert budget._left_in_container(tmp_path) == []
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 2000\nactive_file 300\ninactive_file 700\n")
    assert budget._left_in_container(tmp_path) == []
    (tmp_path / "memory.max").write_text("5000\n")
    assert budget._left_in_container(tmp_path) == [5000 - 3000 + 700]


def test_no_more_processes_than_the_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    one = budget.PROCESS + sum(budget.memory("testbed", SAM).values())
    for free, n in ((0.5, 1), (1.2, 1), (3.6, 3)):
        monkeypatch.setattr(budget, "free_memory", lambda _, free=free: free * one)
        assert budget.processes("testbed", [dataclasses.replace(SAM, micro_batch=1), SAM]) == n
