"""A CLIP model by open_clip, split into an image encoder that is trained and merged, and a frozen head."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from samlib.model import registry, weights
from samlib.model.registry import CONFIG, RANDOM, TESTBED, WEIGHTS
from samlib.store.files import unreadable

if TYPE_CHECKING:  # many seconds to import: what has no need of a model does not wait for it
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer


ROWS = "token_rows"  # (V,) the ids of the tokens that pre-training touched, beside their embeddings


class Encoder(nn.Module):
    """Images to unit features: enlarged where they are smaller, normalised, open_clip's visual tower, L2 norm.

    Args:
        visual: open_clip's visual tower, (B, 3, size, size) -> (B, d).
        mean, std: per channel, of pixels in [0, 1].
        size: pixels a side that the tower reads.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, visual: nn.Module, mean: Sequence[float], std: Sequence[float], size: int = 32) -> None:
        super().__init__()
        self.visual = visual
        self.size = size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Encode square pixels, uint8 in [0, 255] or float in [0, 1], (B, 3, H, H) -> unit features (B, d)."""
        pixels = images.to(self.mean.dtype) / 255 if images.dtype == torch.uint8 else images
        if pixels.shape[-1] != self.size:  # bicubic as Pillow does it
            pixels = nn.functional.interpolate(pixels, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        features = self.visual((pixels - self.mean) / self.std)  # (B, d), bf16 under autocast
        return nn.functional.normalize(features.to(self.mean.dtype), dim=-1)


@dataclass(frozen=True, eq=False)
class Clip:
    """A contrastive image-text model.

    Args:
        encoder: the image side, the part that is fine-tuned and merged.
        model: the whole open_clip model; `encoder` shares its visual tower.
        tokenizer: texts -> token ids (N, context length).
        fingerprint: SHA-256 of the weights and the configuration, part of every cache key.
        size: pixels a side that the encoder reads.
        name: as `load` knows it.

    Taught in: 03_models_and_tasks.
    """

    encoder: Encoder
    model: open_clip.CLIP
    tokenizer: SimpleTokenizer
    fingerprint: str
    size: int = 32
    name: str = TESTBED


def build() -> tuple[open_clip.CLIP, Encoder, SimpleTokenizer]:
    """The testbed's architecture at random initialisation: the model, its image encoder and its tokenizer."""
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    from samlib.model import architecture  # noqa: F401  (config.json names what it registers)

    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    model = open_clip.CLIP(**config["model_cfg"])
    encoder = Encoder(model.visual, **config["preprocess_cfg"])
    return model, encoder, SimpleTokenizer(context_length=model.context_length)


def load_clip(device: str | torch.device = "cpu", model: str = TESTBED) -> Clip:
    """Read a pre-trained model.

    Args:
        device: where the model goes.
        model: "testbed" for the embedded one, or open_clip's name of an architecture and of its weights with a slash
            between, such as "ViT-B-32/openai" (open_clip.list_pretrained() knows them); the same with the file that
            holds them ("ViT-B-32/openai@/home/me/open_clip_model.safetensors"), which spares the hub; other weights of
            the architecture ("ViT-B-32//home/me/clip.safetensors"); or "random" for a dry run.

    Returns:
        The model in evaluation mode, fp32.

    Raises:
        ValueError: no such model, or the weights file is missing, truncated or of another architecture.
        ConnectionError: the weights are on the hub, and the hub cannot be reached.

    Taught in: 03_models_and_tasks.
    """
    return _embedded(device) if model == TESTBED else _open_clip(device, model)


def _embedded(device: str | torch.device) -> Clip:
    if not WEIGHTS.exists():
        raise ValueError(f"the pre-trained weights {WEIGHTS} are missing: reinstall samlib, or train them anew")
    model, encoder, tokenizer = build()
    try:
        state = safetensors.torch.load_file(WEIGHTS)
    except safetensors.SafetensorError as error:
        raise unreadable(WEIGHTS) from error
    embedding = torch.zeros(model.vocab_size, state["token_embedding.weight"].shape[1])
    embedding[state.pop(ROWS).long()] = state["token_embedding.weight"].float()
    try:
        model.load_state_dict({**state, "token_embedding.weight": embedding})
    except RuntimeError as error:
        raise ValueError(f"{WEIGHTS} holds another architecture than config.json: {error}") from error
    digest = hashlib.sha256(WEIGHTS.read_bytes() + CONFIG.read_bytes()).hexdigest()
    model.eval().to(device)
    return Clip(encoder.eval().to(device), model, tokenizer, digest)


def _open_clip(device: str | torch.device, model: str) -> Clip:
    registry.check(model)
    name, tag, file = registry.parts(model)
    released = registry.released(model)
    options: dict[str, Any] = {"force_quick_gelu": released.get("quick_gelu", False)}  # OpenAI's need it
    if tag != RANDOM:
        file = file or weights.weights(model)  # asked for before open_clip is loaded: a missing network is told at once
        options["pretrained"] = str(file)
    import open_clip

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        try:
            made = open_clip.create_model(name, **options)
        except (RuntimeError, safetensors.SafetensorError) as error:
            raise ValueError(f"{file} does not hold the weights of {name}: {error}") from error
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in made.visual.modules()):
        raise ValueError(f"{name} has batch norms, whose statistics no task vector holds: choose a vision transformer")
    pixels = made.visual.preprocess_cfg | released
    size = registry.image_size(model)
    encoder = Encoder(made.visual, pixels["mean"], pixels["std"], size)
    content = hashlib.sha256(np.memmap(file).data).hexdigest() if file else torch.__version__
    decides = [name, options["force_quick_gelu"], pixels["mean"], pixels["std"], size, content]
    made.eval().to(device)
    digest = hashlib.sha256(repr(decides).encode()).hexdigest()
    return Clip(encoder.eval().to(device), made, open_clip.get_tokenizer(name), digest, size, model)


def contrastive_loss(image: Tensor, text: Tensor, caption: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy over a batch in which equal captions are positives of one another.

    Args:
        image, text: unit features, (B, d).
        caption: (B,) the caption's number.
        scale: the inverse temperature, a scalar.

    Source: Radford et al. 2021 (CLIP), figure 3; several positives share the target equally.
    """
    logits = scale * image @ text.T  # (B, B)
    target = (caption[:, None] == caption[None]).float()
    target = target / target.sum(1, keepdim=True)
    cross_entropy = nn.functional.cross_entropy
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
