"""Other people's fine-tuned image encoders under samlib's names: safetensors files of open_clip and transformers.

A file tells neither the activation nor the number of heads: the encoder must have the architecture that was fine-tuned.
Descendants of OpenAI's weights (openai/clip-vit-* on Hugging Face) need quick_gelu, which open_clip's "ViT-B-32" has
only with `force_quick_gelu`; `clip.load("ViT-B-32/openai")` sets it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from samlib.model.theta import Theta

WRAPPERS = re.compile(r"^((module|model|image_encoder)\.)+")  # of DataParallel, ImageEncoder and ImageClassifier


DROPPED = re.compile(  # the text side and scalars, where the image side has a prefix of its own
    r"(text|text_model|text_decoder|transformer|token_embedding|ln_final|classification_head)\..+"
    r"|positional_embedding|attn_mask|text_projection(\.weight|\.bias)?|logit_scale|logit_bias"
    r"|input_resolution|context_length|vocab_size"
)


PROJECTION = "visual_projection.weight"
BLOCK, LAYER = r"transformer\.resblocks\.(\d+)\.", r"encoder.layers.\1."


TRANSFORMERS = {  # open_clip's name after "visual." -> transformers' after "vision_model."
    r"class_embedding": ["embeddings.class_embedding"],
    r"conv1\.weight": ["embeddings.patch_embedding.weight"],
    r"positional_embedding": ["embeddings.position_embedding.weight"],
    r"ln_pre\.(\w+)": [r"pre_layrnorm.\1"],  # sic
    r"ln_post\.(\w+)": [r"post_layernorm.\1"],
    BLOCK + r"ln_([12])\.(\w+)": [LAYER + r"layer_norm\2.\3"],
    BLOCK + r"attn\.in_proj_(\w+)": [LAYER + rf"self_attn.{letter}_proj.\2" for letter in "qkv"],
    BLOCK + r"attn\.out_proj\.(\w+)": [LAYER + r"self_attn.out_proj.\2"],
    BLOCK + r"mlp\.c_fc\.(\w+)": [LAYER + r"mlp.fc1.\2"],
    BLOCK + r"mlp\.c_proj\.(\w+)": [LAYER + r"mlp.fc2.\2"],
}


CONVERT = """{file} is no safetensors file, and to unpickle it could run any code. Convert it where you trust it:
import torch; from safetensors.torch import save_file
state = torch.load({name!r}, "cpu", weights_only=True)  # a whole module: weights_only=False and .state_dict()
save_file({{name: w.contiguous().clone() for name, w in state.items()}}, {out!r})"""


def read(path: Path, encoder: nn.Module) -> Theta:
    """Read a fine-tuned image encoder that samlib, open_clip or transformers saved.

    Args:
        path: safetensors file, or a folder with model.safetensors as `save_pretrained` leaves it.
        encoder: as for `rename`.

    Returns:
        As `rename`.

    Raises:
        ValueError: nothing there, a pickle (.pt, .bin; the error says how to convert it), a damaged file, or tensors
            that do not fit the encoder.

    Taught in: 03_models_and_tasks.
    """
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.exists():
        file = min(path.glob("pytorch_model*.bin"), default=file)
    if not file.is_file():
        raise ValueError(f"there is no checkpoint {file}: give a safetensors file, or a folder with model.safetensors")
    if file.suffix != ".safetensors":
        raise ValueError(CONVERT.format(file=file, name=str(file), out=str(file.with_name("model.safetensors"))))
    try:
        return rename(load_file(file), encoder)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {file}: it is truncated, damaged or no safetensors file") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


@torch.no_grad()
def rename(state: Mapping[str, Tensor], encoder: nn.Module) -> Theta:
    """A fine-tuned image encoder under samlib's names; neither argument is changed.

    The names tell the layout: samlib's own; open_clip's, of a whole model or of the visual tower alone, behind the
    prefixes of task arithmetic's `ImageEncoder` too; transformers' CLIPModel, CLIPVisionModelWithProjection or
    CLIPVisionModel. The last has no projection, because it was frozen in fine-tuning: it is taken from the encoder,
    which must therefore hold the pre-trained weights. Position ids, the text side, a zero-shot head and the temperature
    are dropped, and buffers of the encoder if they have its values (other statistics of BatchNorm are refused).

    Args:
        state: tensors by name; of width w and d features, transformers' have three (w, w) for an attention's input and
            (d, w) for the projection, otherwise the shapes are those of the result.
        encoder: `clip.Encoder` of the same architecture.

    Returns:
        Name -> copy with the shape, dtype and device of the encoder's parameter: (3w, w) for an attention's input,
        (w, d) for the projection.

    Raises:
        ValueError: no layout is recognised, or a tensor is left over, missing, of another shape or no floating point.

    Source: Radford et al. 2021 (CLIP) and Ilharco et al. 2021 (OpenCLIP), whose parametrisation this is.
    Taught in: 03_models_and_tasks.
    """
    rest = {WRAPPERS.sub("", name): w for name, w in state.items()}
    if len(rest) < len(state):
        raise ValueError("two tensors have the same name but for a prefix: expected one image encoder")
    own = dict(encoder.named_parameters())
    places, tower_alone = _places(own, rest)
    theta: Theta = {}
    problems: list[str] = []
    for name, like in own.items():
        sources = places[name]
        turned = sources == [PROJECTION]
        if turned and not rest.keys() & {PROJECTION, "text_projection.weight"}:
            theta[name] = like.detach().clone()
            continue
        shape = tuple(like.shape[::-1] if turned else like.shape)
        shape = shape if len(sources) == 1 else (shape[0] // len(sources), *shape[1:])
        parts = {source: rest.pop(source) for source in sources if source in rest}
        problems += [f"{source} {shape} is missing" for source in sources if source not in parts]
        for source, w in parts.items():
            if w.shape != shape or not w.is_floating_point():
                problems.append(f"{source} is {w.dtype} {tuple(w.shape)}, expected floating point {shape}")
        if not problems:
            w = torch.cat([*parts.values()]) if len(parts) > 1 else parts[sources[0]]
            theta[name] = (w.T if turned else w).to(like, copy=True, memory_format=torch.contiguous_format)
    for name, buffer in encoder.named_buffers():
        for source in (name, name.removeprefix("visual.")):
            if source in rest and torch.equal(rest[source].to(buffer), buffer):
                del rest[source]
    for name, w in rest.items():
        if name.split(".")[-1] != "position_ids" and (tower_alone or not DROPPED.fullmatch(name)):
            problems.append(f"{name}, {w.dtype} {tuple(w.shape)}, is left over: expected nothing of that name")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"it does not fit the encoder: {'; '.join(problems[:3])}{more}")
    return theta


def _places(own: Collection[str], names: Collection[str]) -> tuple[dict[str, list[str]], bool]:
    """Each of the encoder's names -> those in the file that make it up; and whether the file is an unprefixed tower."""
    short = {name: name.removeprefix("visual.") for name in own}
    if any(name in own or name.startswith("visual.") for name in names):
        return {name: [name] for name in own}, False
    vision = "vision_model." if any(name.startswith("vision_model.") for name in names) else ""
    if vision or any(name.startswith(("embeddings.", "encoder.layers.")) for name in names):
        places = {name: [PROJECTION] if short[name] == "proj" else [name] for name in own}
        for pattern, templates in TRANSFORMERS.items():
            for name in own:
                if match := re.fullmatch(pattern, short[name]):
                    places[name] = [vision + match.expand(template) for template in templates]
        return places, False
    if any(name in names for name in short.values()):
        return {name: [short[name]] for name in own}, True
    raise ValueError(
        f"there is no CLIP image encoder in it, only {', '.join([*names][:3]) or 'nothing'}: expected names such as "
        "visual.class_embedding, class_embedding or vision_model.embeddings.class_embedding"
    )
