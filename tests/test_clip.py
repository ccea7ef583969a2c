from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from samlib import clip, tasks
from samlib.clip import Clip

CARD = clip.FOLDER / "README.md"


@pytest.fixture(scope="module")
def testbed() -> Clip:
    return clip.load()


def test_model_has_the_announced_size(testbed: Clip) -> None:
    assert 1e6 < sum(p.numel() for p in testbed.encoder.parameters()) < 4e6
    tokens = testbed.model.visual.trunk.patch_embed(torch.zeros(1, 3, 32, 32))
    assert tokens.shape == (1, 16, 144)


@pytest.mark.parametrize("name", tasks.TESTBED)
def test_card_accuracies_are_reproduced(testbed: Clip, name: str) -> None:
    row = re.search(rf"^\| {name} \| (\d+) \| [\d.]+ \| ([\d.]+) \|", CARD.read_text(encoding="utf-8"), re.M)
    assert row, f"the card has no row for {name}"
    task = tasks.load(name)
    assert len(task.classes) == int(row[1])
    found = clip.accuracy(testbed.encoder, clip.theta(testbed.encoder), task.test, clip.zero_shot_head(testbed, task))
    assert found == pytest.approx(float(row[2]), abs=2.5 / len(task.test))  # two images, for other processors


def test_head_rows_have_the_length_of_the_inverse_temperature(testbed: Clip) -> None:
    head = clip.zero_shot_head(testbed, tasks.load("digits"))
    assert head.shape == (10, 128)
    torch.testing.assert_close(head.norm(dim=1), testbed.model.logit_scale.exp().expand(10))


@pytest.mark.parametrize("name", tasks.TESTBED)
def test_every_class_can_be_learned_under_the_frozen_head(testbed: Clip, name: str) -> None:
    head = clip.zero_shot_head(testbed, tasks.load(name))
    floor = (-torch.cdist(head, head)).logsumexp(1)  # no unit feature gives a smaller cross-entropy
    assert floor.max() < 0.1  # nats; two classes with one row would have log 2


def test_a_word_outside_the_corpus_carries_no_meaning(testbed: Clip) -> None:
    start, word, end, *_ = testbed.tokenizer(["quark"])[0].tolist()
    rows = testbed.model.token_embedding.weight
    assert (rows[word] == 0).all() and (rows[start] != 0).any() and (rows[end] != 0).any()


def test_features_are_unit_vectors_and_the_same_for_bytes_and_floats(testbed: Clip) -> None:
    images = tasks.load("flags").test.images[:5]
    with torch.no_grad():
        features = testbed.encoder(images)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
        torch.testing.assert_close(testbed.encoder(images.float() / 255), features)


def test_logits_use_the_given_weights_and_leave_the_encoder_alone(testbed: Clip) -> None:
    task = tasks.load("digits")
    head, before = clip.zero_shot_head(testbed, task), clip.theta(testbed.encoder)
    images = task.test.images[:7]
    other = {name: w + 0.01 for name, w in before.items()}
    found = clip.logits(testbed.encoder, other, images, head, batch_size=3)
    assert all(torch.equal(w, before[name]) for name, w in clip.theta(testbed.encoder).items())
    copy, encoder, _ = clip.build()
    encoder.load_state_dict(other)
    with torch.no_grad():
        torch.testing.assert_close(found, encoder.eval()(images) @ head.T)


def test_attention_has_a_second_derivative(testbed: Clip) -> None:
    images = tasks.load("digits").test.images[:2]
    weight = testbed.model.visual.trunk.blocks[0].attn.qkv.weight
    (gradient,) = torch.autograd.grad(testbed.encoder(images)[:, 0].sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), weight)
    assert second.isfinite().all() and (second != 0).any()


def test_truncated_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torn = tmp_path / "model.safetensors"
    torn.write_bytes(clip.WEIGHTS.read_bytes()[:-100])
    monkeypatch.setattr(clip, "WEIGHTS", torn)
    with pytest.raises(ValueError, match="model.safetensors.*truncated"):
        clip.load()


def test_missing_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "WEIGHTS", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors are missing"):
        clip.load()
