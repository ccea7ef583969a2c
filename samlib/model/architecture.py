"""The image encoder of the testbed's model, registered with timm; apart from `clip`, since timm is slow to import."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
from timm.layers import GroupNorm1, HybridEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn

default_cfgs = generate_default_cfgs({"vit_convstem_32": {"input_size": (3, 32, 32)}})  # timm looks for this name


@timm.models.register_model
def vit_convstem_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A ViT for 32-pixel images: three stride-2 convolutions make 16 tokens, four blocks of width 144 read them."""
    width = 144
    stem = ConvStem(
        depth=3, channels=(24, 64, width), stride=(2, 2, 2), norm_layer=GroupNorm1, act_layer=nn.GELU
    )  # (B, 3, 32, 32) -> (B, 144, 4, 4)
    arguments = {
        "img_size": 32,
        "patch_size": 1,
        "embed_dim": width,
        "depth": 4,
        "num_heads": 4,
        "class_token": False,
        "global_pool": "avg",
        "embed_layer": partial(HybridEmbed, backbone=stem, proj=False),
    }
    model = build_model_with_cfg(VisionTransformer, "vit_convstem_32", pretrained, **{**arguments, **kwargs})
    for block in model.blocks:  # fused attention has no second derivative, and is slow in bf16 on the CPU
        block.attn.fused_attn = False  # type: ignore[union-attr]
    return model
