from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from conftest import SMALL_VIT
from PIL import Image

from samlib.data import catalogue, hub
from samlib.data.tasks import load_task
from samlib.model import clip, evaluate, registry, weights
from samlib.model.clip import Clip, load_clip
from samlib.model.head import zero_shot_head
from samlib.model.theta import weights_of

CARD = registry.WEIGHTS.with_name("README.md")


@pytest.fixture(scope="module")
def testbed() -> Clip:
    return load_clip()


def test_model_has_the_announced_size(testbed: Clip) -> None:
    assert 1e6 < sum(p.numel() for p in testbed.encoder.parameters()) < 4e6
    tokens = testbed.model.visual.trunk.patch_embed(torch.zeros(1, 3, 32, 32))
    assert tokens.shape == (1, 16, 144)


@pytest.mark.parametrize("name", catalogue.TASKS)
def test_card_accuracies_are_reproduced(testbed: Clip, name: str) -> None:
    row = re.search(rf"^\| {name} \| (\d+) \| [\d.]+ \| ([\d.]+) \|", CARD.read_text(encoding="utf-8"), re.M)
    assert row, f"the card has no row for {name}"
    task = load_task(name)
    assert len(task.classes) == int(row[1])
    found = evaluate.accuracy(testbed.encoder, weights_of(testbed.encoder), task.test, zero_shot_head(testbed, task))
    assert found == pytest.approx(float(row[2]), abs=2.5 / len(task.test))  # two images, for other processors


def test_head_rows_have_the_length_of_the_inverse_temperature(testbed: Clip) -> None:
    head = zero_shot_head(testbed, load_task("digits"))
    assert head.shape == (10, 128)
    torch.testing.assert_close(head.norm(dim=1), testbed.model.logit_scale.exp().expand(10))


@pytest.mark.parametrize("name", catalogue.TASKS)
def test_every_class_can_be_learned_under_the_frozen_head(testbed: Clip, name: str) -> None:
    head = zero_shot_head(testbed, load_task(name))
    floor = (-torch.cdist(head, head)).logsumexp(1)  # no unit feature gives a smaller cross-entropy
    assert floor.max() < 0.1  # nats; two classes with one row would have log 2


def test_a_word_outside_the_corpus_carries_no_meaning(testbed: Clip) -> None:
    start, word, end, *_ = testbed.tokenizer(["quark"])[0].tolist()
    rows = testbed.model.token_embedding.weight
    assert (rows[word] == 0).all() and (rows[start] != 0).any() and (rows[end] != 0).any()


def test_features_are_unit_vectors_and_the_same_for_bytes_and_floats(testbed: Clip) -> None:
    images = load_task("flags").test.images[:5]
    with torch.no_grad():
        features = testbed.encoder(images)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
        torch.testing.assert_close(testbed.encoder(images.float() / 255), features)


def test_logits_use_the_given_weights_and_leave_the_encoder_alone(testbed: Clip) -> None:
    task = load_task("digits")
    head, before = zero_shot_head(testbed, task), weights_of(testbed.encoder)
    images = task.test.images[:7]
    other = {name: w + 0.01 for name, w in before.items()}
    found = evaluate.logits(testbed.encoder, other, images, head, batch_size=3)
    assert all(torch.equal(w, before[name]) for name, w in weights_of(testbed.encoder).items())
    copy, encoder, _ = clip.build()
    encoder.load_state_dict(other)
    with torch.no_grad():
        torch.testing.assert_close(found, encoder.eval()(images) @ head.T)


def test_attention_has_a_second_derivative(testbed: Clip) -> None:
    images = load_task("digits").test.images[:2]
    weight = testbed.model.visual.trunk.blocks[0].attn.qkv.weight
    (gradient,) = torch.autograd.grad(testbed.encoder(images)[:, 0].sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), weight)
    assert second.isfinite().all() and (second != 0).any()


def test_truncated_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torn = tmp_path / "model.safetensors"
    torn.write_bytes(registry.WEIGHTS.read_bytes()[:-100])
    monkeypatch.setattr(clip, "WEIGHTS", torn)
    with pytest.raises(ValueError, match="model.safetensors.*truncated"):
        load_clip()


def test_missing_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "WEIGHTS", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors are missing"):
        load_clip()


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, open_clip.CLIP]:
    """A model as open_clip releases one: a configuration that it knows by name, and a safetensors file."""
    folder = tmp_path_factory.mktemp("released")
    (folder / "tiny-ViT.json").write_text(json.dumps(SMALL_VIT))
    open_clip.add_model_config(folder / "tiny-ViT.json")
    torch.manual_seed(5)
    model = open_clip.create_model("tiny-ViT").eval()
    file = folder / "open_clip_model.safetensors"
    safetensors.torch.save_file({name: w.contiguous() for name, w in model.state_dict().items()}, file)
    return file, model


@pytest.fixture
def tagged(released: tuple[Path, open_clip.CLIP], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same file as weights "openai" of a table like open_clip's, with an activation and pixels of their own."""
    tag = {"hf_hub": "someone/tiny/", "quick_gelu": True, "mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-ViT", {"openai": tag})
    return released[0]


def test_open_clip_model_by_file(released: tuple[Path, open_clip.CLIP]) -> None:
    file, model = released
    found = load_clip(model=f"tiny-ViT/{file}")
    assert (found.size, found.name) == (48, f"tiny-ViT/{file}") and registry.image_size(found.name) == 48
    pixels = torch.randint(0, 256, (5, 3, 48, 48), dtype=torch.uint8)
    mean, std = (torch.tensor(getattr(open_clip, f"OPENAI_DATASET_{name}")).view(3, 1, 1) for name in ("MEAN", "STD"))
    with torch.no_grad():
        expected = model.encode_image((pixels / 255 - mean) / std, normalize=True)
        torch.testing.assert_close(found.encoder(pixels), expected)
    head = zero_shot_head(found, load_task("warm", found.size))
    assert head.shape == (3, 24)
    torch.testing.assert_close(head.norm(dim=1), model.logit_scale.exp().expand(3))
    assert registry.identity(found.name) != registry.identity("testbed") and "tiny-ViT" in registry.identity(found.name)


def test_weights_of_a_tag_come_with_their_activation(
    tagged: Path, released: tuple[Path, open_clip.CLIP], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's models need QuickGELU, which open_clip's configurations leave out."""
    folder = tmp_path / "models--someone--tiny"  # as the hub's own cache keeps it
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "open_clip_model.safetensors").symlink_to(tagged)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = load_clip(model="tiny-ViT/openai")
    kinds = {type(m).__name__ for m in found.encoder.modules()}
    assert "QuickGELU" in kinds and "GELU" not in kinds
    assert found.encoder.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert torch.equal(found.encoder.visual.proj, released[1].visual.proj)


def test_random_weights_are_the_same_every_time(released: tuple[Path, open_clip.CLIP]) -> None:
    before = torch.get_rng_state()
    one, two = load_clip(model="tiny-ViT/random"), load_clip(model="tiny-ViT/random")
    assert torch.equal(torch.get_rng_state(), before)
    assert one.fingerprint == two.fingerprint
    assert all(torch.equal(w, weights_of(two.encoder)[name]) for name, w in weights_of(one.encoder).items())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("ViT-B-23/openai", "did you mean"),
        ("tiny-ViT/openai", "open_clip has no weights 'openai' for tiny-ViT, only none"),
        ("tiny-ViT//nowhere/w.safetensors", "weights /nowhere/w.safetensors of tiny-ViT are no safetensors file"),
        ("ViT-B-32/openia", "has no weights 'openia' for ViT-B-32, only openai"),
    ],
)
def test_a_model_that_is_not_there(released: tuple[Path, open_clip.CLIP], model: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_clip(model=model)


def test_weights_of_another_architecture_are_refused(released: tuple[Path, open_clip.CLIP], tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"visual.proj": torch.zeros(2, 2)}, file)
    with pytest.raises(ValueError, match="other.safetensors does not hold the weights of tiny-ViT"):
        load_clip(model=f"tiny-ViT/{file}")


def test_without_a_network_the_error_names_weights_and_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr(hub.huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(hub.huggingface_hub, "get_hf_file_metadata", refuse)
    begun = time.monotonic()
    with pytest.raises(
        ConnectionError, match="'openai' of ViT-B-32, .*no route.*python -m samlib.model.fetch --model ViT-B-32/openai"
    ):
        load_clip(model="ViT-B-32/openai")
    with pytest.raises(ConnectionError, match="'openai' of ViT-B-32, .*no route"):
        weights.weights("ViT-B-32/openai")
    assert time.monotonic() - begun < 5


def test_small_images_are_enlarged_as_pillow_does() -> None:
    draw = torch.Generator().manual_seed(0)
    small = (torch.rand(3, 28, 28, generator=draw) * 90 + 80).to(torch.uint8)  # where nothing is clipped on the way
    seen = {}
    encoder = clip.Encoder(torch.nn.Flatten(), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 112)
    encoder.visual.register_forward_hook(lambda _m, inputs, _o: seen.update(x=inputs[0]))
    encoder(small[None])
    picture = Image.fromarray(small.permute(1, 2, 0).numpy()).resize((112, 112), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255
    assert (seen["x"][0] - expected).abs().max() < 1.5 / 255  # Pillow rounds twice to whole numbers


def test_fewer_large_images_go_through_at_once(testbed: Clip) -> None:
    assert evaluate.per_pass(testbed.encoder, 500) == 500 and evaluate.per_pass(testbed.encoder, 100, 2**20) == 100
    large = clip.Encoder(torch.nn.Identity(), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 224)
    assert evaluate.per_pass(large, 500) == 111 and evaluate.per_pass(large, 100, 2**20) == 6
    assert evaluate.per_pass(large, 500, 10) == 1


def test_the_configuration_is_part_of_the_fingerprint(tagged: Path) -> None:
    """The same file with and without what its tag says about it: other models, with keys of their own."""
    plain, named = load_clip(model=f"tiny-ViT/{tagged}"), load_clip(model=f"tiny-ViT/openai@{tagged}")
    assert plain.fingerprint != named.fingerprint
    assert "QuickGELU" in {type(m).__name__ for m in named.encoder.modules()}


def test_batch_norms_are_refused() -> None:
    with pytest.raises(ValueError, match="RN50 has batch norms"):
        load_clip(model="RN50/random")


def test_what_is_known_without_open_clip_is_what_open_clip_knows() -> None:
    """`python -m tools.open_clip_table` makes it so."""
    shipped = registry._table()
    if shipped["version"] != importlib.metadata.version("open_clip_torch"):
        pytest.skip("the table is that of another version, and what it lacks is asked of open_clip")
    names = [name for name in open_clip.list_models() if name != "tiny-ViT"]
    assert list(shipped["models"]) == names and len(names) > 100
    usual = asdict(open_clip.transform.PreprocessCfg())
    for name, row in shipped["models"].items():
        assert row == json.loads(json.dumps(registry.table_row(open_clip, name)))
        for tag, told in row["tags"].items():
            config = open_clip.get_pretrained_cfg(name, tag)
            assert all(
                told.get(key, usual.get(key, False)) == config.get(key, False) for key in ("hf_hub", "quick_gelu")
            )
            for key in ("mean", "std", "interpolation", "resize_mode"):
                assert tuple(told.get(key, usual[key])) == tuple(config.get(key, usual[key]))
    assert shipped["models"]["ViT-B-32"]["tags"]["openai"]["quick_gelu"] is True


def test_another_open_clip_is_asked_for_what_the_table_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is loaded for that alone."""
    asked: list[str] = []

    def load(name: str) -> Any:
        asked.append(name)
        return open_clip

    monkeypatch.delitem(sys.modules, "open_clip")
    monkeypatch.setattr(registry.importlib, "import_module", load)
    shipped = registry._table()["models"]["ViT-B-32"]
    lacking = {"size": 224, "tags": {"laion400m_e31": shipped["tags"]["laion400m_e31"]}}
    monkeypatch.setattr(registry, "_table", lambda: {"version": "1", "models": {"ViT-B-32": lacking}})
    registry.check("ViT-B-32/laion400m_e31")
    assert asked == [] and registry.image_size("ViT-B-32/random") == 224
    registry.check("ViT-B-16/random")
    registry.check("ViT-B-32/openai")
    assert set(asked) == {"open_clip"}
