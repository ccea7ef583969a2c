"""Frozen classification heads, written by the text encoder."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from samlib.data.tasks import Task
from samlib.model.clip import Clip


def zero_shot_head(clip: Clip, task: Task) -> Tensor:
    """A linear classifier written by the text encoder: one unit vector a class, times the inverse temperature.

    Args:
        clip: the pre-trained model.
        task: its phrases fill its templates.

    Returns:
        (K, d), to be multiplied with unit image features.

    Source: Radford et al. 2021 (CLIP), section 3.1.4 (prompt ensembling).
    Taught in: 03_models_and_tasks.
    """
    heads = _HEADS.setdefault(clip, {})
    key = task.phrases, task.templates
    if key not in heads:
        heads[key] = _head(clip, *key)
    return heads[key].clone()


# hundreds of sentences, and a large model's text encoder takes its time
_HEADS: WeakKeyDictionary[Clip, dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor]] = WeakKeyDictionary()


@torch.no_grad()
def _head(clip: Clip, phrases: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
    device = clip.model.logit_scale.device
    rows = []
    for phrase in phrases:
        tokens = clip.tokenizer([template.format(phrase) for template in templates]).to(device)
        text = clip.model.encode_text(tokens, normalize=True).mean(0)  # (d,)
        rows.append(nn.functional.normalize(text, dim=0))
    return torch.stack(rows) * clip.model.logit_scale.exp()  # (K, d)
