"""Foreign image encoders, with transformers' own CLIP as the independent oracle."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import TinyEncoder
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import CLIPModel, CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from samlib.model import clip, foreign
from samlib.model.clip import Encoder
from samlib.model.theta import weights_of

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 3}
SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
THEIRS = {**SIZES, "image_size": 32, "patch_size": 8, "projection_dim": 48, "hidden_act": "quick_gelu"}
BLOCK = "encoder.layers.1.self_attn."

transformers.logging.set_verbosity_error()


def scattered(seed: int, make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Weights that are all different, gains and biases too, so that no two can be mistaken for each other."""
    torch.manual_seed(seed)
    model = make(*args, **kwargs)
    with torch.no_grad():
        for w in model.parameters():
            w.add_(0.1 * torch.randn_like(w))
    return model.eval()


def whole(seed: int) -> nn.Module:
    return scattered(seed, open_clip.CLIP, embed_dim=48, vision_cfg=VISION, text_cfg=TEXT, quick_gelu=True)


@pytest.fixture
def encoder() -> Encoder:
    """Pre-trained, of the architecture of every file below."""
    return Encoder(whole(1).visual, MEAN, STD)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    torch.manual_seed(2)
    return torch.rand(5, 3, 32, 32)


def with_projection() -> nn.Module:
    return scattered(3, CLIPVisionModelWithProjection, CLIPVisionConfig(**THEIRS))


def whole_theirs() -> nn.Module:
    text = {**SIZES, "hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=THEIRS, projection_dim=48)
    return scattered(3, CLIPModel, config)


def without_projection() -> nn.Module:
    return scattered(3, CLIPVisionModel, CLIPVisionConfig(**THEIRS))


def features(model: nn.Module, pixels: Tensor, proj: Tensor) -> Tensor:
    """By transformers: normalised pixels -> unit features (B, 48)."""
    normalised = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        if isinstance(model, CLIPVisionModel):
            out = model(pixel_values=normalised).pooler_output @ proj
        elif isinstance(model, CLIPModel):
            out = model.visual_projection(model.vision_model(pixel_values=normalised).pooler_output)
        else:
            out = model(pixel_values=normalised).image_embeds
    return F.normalize(out, dim=-1)


def like(theta: dict[str, Tensor], encoder: nn.Module) -> None:
    """Names in the encoder's order, shapes and dtypes are the encoder's, and each tensor can be stored."""
    own = dict(encoder.named_parameters())
    assert list(theta) == list(own)
    for name, w in theta.items():
        assert (w.shape, w.dtype, w.device) == (own[name].shape, own[name].dtype, own[name].device)
        assert w.is_contiguous() and not w.requires_grad


@pytest.mark.parametrize("make", [with_projection, whole_theirs, without_projection])
def test_a_transformers_file_gives_the_outputs_of_transformers(
    make: Callable[[], nn.Module], encoder: Encoder, pixels: Tensor, tmp_path: Path
) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    before = {name: w.clone() for name, w in encoder.state_dict().items()}
    theta = foreign.read(tmp_path, encoder)
    like(theta, encoder)
    with torch.no_grad():
        found = functional_call(encoder, theta, (pixels,))
    expected = features(model, pixels, encoder.visual.proj)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - encoder(pixels)).abs().max() > 1e-2  # the test would notice the encoder's own weights
    for w in theta.values():
        w.zero_()
    after = encoder.state_dict()
    assert all(torch.equal(w, after[name]) for name, w in before.items())
    like(foreign.read(tmp_path / "model.safetensors", encoder), encoder)


def test_files_of_older_transformers(encoder: Encoder, tmp_path: Path) -> None:
    """CLIPVisionModel had a prefix in its names, and position ids were saved."""
    state = {f"vision_model.{name}": w for name, w in without_projection().state_dict().items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    theta = foreign.rename(state, encoder)
    expected = foreign.rename(without_projection().state_dict(), encoder)
    assert all(torch.equal(w, expected[name]) for name, w in theta.items())
    assert torch.equal(theta["visual.proj"], encoder.visual.proj)


def test_a_whole_model_without_its_projection_is_not_completed(encoder: Encoder) -> None:
    state = whole_theirs().state_dict()
    del state["visual_projection.weight"]
    with pytest.raises(ValueError, match=r"visual_projection\.weight \(48, 64\) is missing$"):
        foreign.rename(state, encoder)


def test_what_samlib_wrote_comes_back(encoder: Encoder, tmp_path: Path) -> None:
    theta = weights_of(Encoder(whole(4).visual, MEAN, STD))
    save_file(theta, tmp_path / "theta.safetensors")
    found = foreign.read(tmp_path / "theta.safetensors", encoder)
    like(found, encoder)
    assert all(torch.equal(w, theta[name]) for name, w in found.items())
    tiny = weights_of(TinyEncoder())
    found = foreign.rename(tiny, TinyEncoder())
    assert all(torch.equal(w, tiny[name]) and w is not tiny[name] for name, w in found.items())


def test_the_testbed_is_read_too() -> None:
    model, encoder, _ = clip.build()
    theta = foreign.rename(model.state_dict(), encoder)
    like(theta, encoder)
    assert all(torch.equal(w, theta[name]) for name, w in encoder.named_parameters())


PREFIXES = ["", "module.", "model.", "image_encoder.", "image_encoder.model.", "module.image_encoder.model."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("part", ["whole", "tower", "visual"])
def test_open_clip_files_with_every_prefix(prefix: str, part: str, encoder: Encoder, tmp_path: Path) -> None:
    model = whole(4)
    state = model.visual.state_dict() if part == "tower" else model.state_dict()
    if part == "visual":
        state = {name: w for name, w in state.items() if name.startswith("visual.")}
    state = {prefix + name: w for name, w in state.items()}
    if part == "whole":
        state |= {"classification_head.weight": torch.ones(3, 48), "classification_head.bias": torch.zeros(3)}
        state |= {f"{prefix}attn_mask": torch.zeros(8, 8), f"{prefix}vocab_size": torch.tensor(50)}
    save_file(state, tmp_path / "clip.safetensors")
    theta = foreign.read(tmp_path / "clip.safetensors", encoder)
    like(theta, encoder)
    assert all(torch.equal(w, theta[f"visual.{name}"]) for name, w in model.visual.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [with_projection, lambda: whole(4)])
def test_the_encoders_dtype_is_kept(make: Callable[[], nn.Module], dtype: torch.dtype, encoder: Encoder) -> None:
    exact = foreign.rename(make().state_dict(), encoder)
    theta = foreign.rename(make().to(dtype).state_dict(), encoder)
    like(theta, encoder)
    for name, w in theta.items():
        assert torch.equal(w, exact[name].to(dtype).float())
    half = encoder.to(torch.float16)
    like(foreign.rename(make().state_dict(), half), half)


def test_the_result_shares_no_memory_with_the_arguments(encoder: Encoder) -> None:
    state = {f"visual.{name}": w for name, w in whole(4).visual.state_dict().items()}
    before = {name: w.clone() for name, w in state.items()}
    for w in foreign.rename(state, encoder).values():
        w.fill_(7)
    assert all(torch.equal(w, before[name]) for name, w in state.items()) and len(state) == len(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"embeddings.extra": torch.ones(2)},
            r"fit the encoder: embeddings\.extra, torch.float32 \(2,\), is left over",
        ),
        ({BLOCK + "k_proj.weight": None}, rf"{BLOCK}k_proj\.weight \(64, 64\) is missing$"),
        ({BLOCK + "q_proj.bias": torch.ones(3)}, r"q_proj\.bias is torch.float32 \(3,\), expected .* \(64,\)$"),
        ({BLOCK + "v_proj.weight": torch.ones(())}, r"v_proj\.weight is torch.float32 \(\), expected .* \(64, 64\)$"),
        ({"visual_projection.weight": torch.ones(64, 48)}, r"\(64, 48\), expected floating point \(48, 64\)$"),
        ({"post_layernorm.bias": torch.ones(64, dtype=torch.int8)}, r"is torch.int8 \(64,\), expected floating point"),
        ({f"{BLOCK}{n}_proj.bias": None for n in ("q", "k", "v", "out")}, r"^(?!.*out_proj).*; and 1 more$"),
    ],
)
def test_a_transformers_file_of_another_model_is_refused(
    change: dict[str, Tensor | None], message: str, encoder: Encoder
) -> None:
    state = without_projection().state_dict()
    state = {name: w for name, w in (state | change).items() if w is not None}
    with pytest.raises(ValueError, match=message):
        foreign.rename(state, encoder)


@pytest.mark.parametrize("prefix", ["model.visual.", ""])
def test_an_open_clip_file_of_another_model_is_refused(prefix: str, encoder: Encoder, tmp_path: Path) -> None:
    state = {prefix + name: w for name, w in whole(4).visual.state_dict().items()}
    name = prefix + "transformer.resblocks.1.ln_2.weight"
    shown = re.escape(name.removeprefix("model."))
    for changed, message in [
        ({n: w for n, w in state.items() if n != name}, rf"{shown} \(64,\) is missing$"),
        (state | {name: torch.ones(65)}, rf"{shown} is torch.float32 \(65,\), expected floating point \(64,\)$"),
        (
            state | {name.replace("1", "7", 1): torch.ones(2)},
            rf"{shown.replace('1', '7', 1)}, .* is left over: expected",
        ),
    ]:
        save_file(changed, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=rf"other\.safetensors: it does not fit the encoder: {message}"):
            foreign.read(tmp_path / "other.safetensors", encoder)


def test_a_file_without_an_image_encoder_is_refused(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match=r"only lm_head\.weight: expected names such as visual\.class_embedding"):
        foreign.rename({"lm_head.weight": torch.ones(2)}, encoder)
    with pytest.raises(ValueError, match="only nothing: expected names"):
        foreign.rename({}, encoder)
    text = {name: w for name, w in whole(4).state_dict().items() if not name.startswith("visual.")}
    with pytest.raises(ValueError, match="class_embedding .* is missing"):
        foreign.rename(text, encoder)
    two = {"visual.proj": torch.ones(64, 48), "model.visual.proj": torch.ones(64, 48)}
    with pytest.raises(ValueError, match="expected one image encoder"):
        foreign.rename(two, encoder)


def test_buffers_are_dropped_only_when_they_are_the_encoders() -> None:
    config = {"image_size": 32, "patch_size": 8, "width": 8, "layers": (1, 1, 1, 1)}  # a ResNet with BatchNorm
    model = open_clip.CLIP(embed_dim=16, vision_cfg=config, text_cfg=TEXT)
    encoder = Encoder(model.visual, MEAN, STD)
    for state in (model.state_dict(), model.visual.state_dict()):
        like(foreign.rename(state, encoder), encoder)
    state = model.state_dict() | {"visual.bn1.running_mean": torch.ones(4)}
    with pytest.raises(ValueError, match=r"visual\.bn1\.running_mean, .* is left over"):
        foreign.rename(state, encoder)


@pytest.mark.parametrize("name", ["finetuned.pt", "pytorch_model.bin"])
def test_a_pickle_is_refused_with_the_lines_that_convert_it(
    name: str, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = whole(4)
    torch.save(model.state_dict(), tmp_path / name)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ValueError, match="is no safetensors file, and to unpickle it could run any code") as error:
        foreign.read(tmp_path if name.endswith(".bin") else tmp_path / name, encoder)
    monkeypatch.undo()
    first, *lines = str(error.value).splitlines()
    assert name in first and len(lines) == 3
    exec("\n".join(lines), {})
    theta = foreign.read(tmp_path, encoder)
    assert torch.equal(theta["visual.proj"], model.visual.proj)


def test_files_that_cannot_be_read(encoder: Encoder, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.safetensors", tmp_path / "nothing.bin"):
        with pytest.raises(ValueError, match="there is no checkpoint .*: give a safetensors file, or a folder"):
            foreign.read(path, encoder)
    file = tmp_path / "model.safetensors"
    without_projection().save_pretrained(tmp_path)
    whole_file = file.read_bytes()
    for content in (whole_file[:-100], whole_file[:5], b"", b"PK\x03\x04 a pickle under a wrong name"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read .*model\.safetensors: it is truncated, damaged or no"):
            foreign.read(tmp_path, encoder)
