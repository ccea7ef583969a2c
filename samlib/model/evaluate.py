"""Outputs, accuracy and loss of a model on splits of images: every forward pass without training is here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from samlib.data.tasks import Split
from samlib.model.theta import Theta


def per_pass(encoder: nn.Module, most: int, numbers: int = 2**24) -> int:
    """How many images go through the encoder at once: `most`, but fewer of larger ones.

    Args:
        encoder: says how large its images are.
        most: upper limit, >= 1, which holds for images of 32 pixels a side.
        numbers: in the pixels of all of them; 2^20 where a backward pass follows.
    """
    return max(1, min(most, numbers // (3 * getattr(encoder, "size", 32) ** 2)))


@torch.no_grad()
def logits(encoder: nn.Module, theta: Theta, images: Tensor, head: Tensor, batch_size: int | None = None) -> Tensor:
    """The outputs f(x; theta) of the encoder with other weights in place of its own, which stay untouched.

    Args:
        encoder: gives the architecture.
        theta: weights by name.
        images: (N, 3, H, W), uint8.
        head: (K, d).
        batch_size: images in one forward pass, None for `per_pass`.

    Returns:
        (N, K), on the device of the head.
    """
    encoder.eval()
    chunks = images.split(batch_size or per_pass(encoder, 500))
    return torch.cat([functional_call(encoder, theta, (chunk.to(head.device),)) @ head.T for chunk in chunks])


def accuracy(encoder: nn.Module, theta: Theta, split: Split, head: Tensor) -> float:
    """Share of the images whose largest logit is the label's, in [0, 1].

    Args:
        encoder: gives the architecture.
        theta: weights by name.
        split: images and labels.
        head: (K, d).
    """
    predicted = logits(encoder, theta, split.images, head).argmax(1)
    return (predicted == split.labels.to(predicted.device)).double().mean().item()


BACKWARD = 2**20  # numbers in the pixels of the images of one backward pass


@torch.no_grad()
def outputs(
    encoder: nn.Module, theta: Theta, splits: Sequence[Split], heads: Sequence[Tensor], batch_size: int | None = None
) -> list[Tensor]:
    """The outputs f(x; theta) of one model for the images of several tasks, in one pass over all of them.

    Args:
        encoder: gives the architecture.
        theta: weights by name.
        splits, heads: images (N_t, 3, H, W), and head (K_t, d), of each of T tasks.
        batch_size: images in one forward pass, None for `evaluate.per_pass`.

    Returns:
        T tensors (N_t, K_t).

    Raises:
        ValueError: as many heads as splits are needed.
    """
    encoder.eval()
    batch_size = batch_size or per_pass(encoder, 200)
    images = [split.images for split in splits]
    if len({x.shape[1:] for x in images}) == 1:  # else they fit into no common batch
        images = [torch.cat(images)]
    parts = (part.to(heads[0].device) for x in images for part in x.split(batch_size))
    features = torch.cat([functional_call(encoder, theta, (part,)) for part in parts])  # (sum of N_t, d)
    each = features.split([len(split) for split in splits])
    return [z @ head.T for z, head in zip(each, heads, strict=True)]


def losses(encoder: nn.Module, theta: Theta, splits: Sequence[Split], heads: Sequence[Tensor]) -> Tensor:
    """Mean cross-entropy of one model on each of T tasks: float64 (T,), in nats. Arguments as for `outputs`."""
    found = outputs(encoder, theta, splits, heads)
    labels = (split.labels.to(heads[0].device) for split in splits)
    return torch.stack([cross_entropy(z.double(), y).cpu() for z, y in zip(found, labels, strict=True)])
