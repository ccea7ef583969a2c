"""Pre-training of the testbed's CLIP on its captioned corpus: `python -m tools.pretrain`."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import time
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample
from torch.nn.parallel import DistributedDataParallel

from samlib.data.batches import batch_indices, generator
from samlib.data.catalogue import FOLDER
from samlib.data.tasks import _file, _pixels
from samlib.model import clip, registry
from samlib.model.clip import contrastive_loss
from samlib.store import checkpoint, keys
from samlib.store.files import replacing
from samlib.train.schedule import lr_at

TEMPLATES = ("{}.", "a picture of {}.", "an icon of {}.", "a drawing of {}.")
LARGEST_LOGIT_SCALE = math.log(50)
CHECKPOINT_SECONDS = 120.0


def augment(images: Tensor, mono: Tensor, draw: torch.Generator) -> Tensor:
    """Random colours for the one-colour drawings, then a random affine view, light and blur for all.

    Args:
        images: (B, 3, 32, 32), in [0, 1].
        mono: bool (B,), which of them are black on white.
        draw: decides everything.

    Returns:
        (B, 3, 32, 32), in [0, 1].
    """
    n = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=draw)

    ink, paper = uniform(0, 1, 3, 1, 1), uniform(0, 1, 3, 1, 1)
    paper = torch.where((ink.mean(1, True) - paper.mean(1, True)).abs() < 0.25, 1 - ink.round(), paper)
    coin = uniform(0, 1, 1, 1, 1)
    ink = torch.where(coin < 0.5, torch.where(coin < 0.2, torch.zeros(3, 1, 1), torch.ones(3, 1, 1)), ink)
    paper = torch.where(coin < 0.5, 1 - ink, paper)
    tinted = paper * images + ink * (1 - images)  # black becomes ink, white becomes paper
    images = torch.where(mono.view(n, 1, 1, 1), tinted, images)

    angle, shear = uniform(-0.2, 0.2), uniform(-0.15, 0.15)
    scale_x, scale_y = uniform(0.9, 1.35), uniform(0.9, 1.35)
    shift = uniform(-0.2, 0.2, 2)
    matrix = torch.stack(
        [
            torch.stack([scale_x * angle.cos(), -scale_y * (angle.sin() + shear), shift[:, 0]], 1),
            torch.stack([scale_x * angle.sin(), scale_y * angle.cos(), shift[:, 1]], 1),
        ],
        1,
    )  # (B, 2, 3)
    grid = affine_grid(matrix, list(images.shape), align_corners=False)
    images = grid_sample(images, grid, padding_mode="border", align_corners=False)

    blurred = avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    images = images.lerp(blurred, uniform(-0.5, 1, 1, 1, 1).clamp_min(0))
    contrast, light = uniform(0.6, 1.1, 1, 1, 1), uniform(-0.15, 0.15, 3, 1, 1) + uniform(-0.1, 0.1, 1, 1, 1)
    return ((images - 0.5) * contrast + 0.5 + light).clamp(0, 1)


class _Pair(nn.Module):
    """Both towers behind one forward, as DistributedDataParallel wants it; autocast for the image tower alone."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.encoder, self.tokenizer = clip.build()

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16):
            features = self.encoder(images).float()
        return features, self.model.encode_text(tokens, normalize=True), self.model.logit_scale.exp()


def save(model: nn.Module, rows: Tensor, path: Path) -> None:
    """Write the weights atomically, with only the token rows that training touched.

    Args:
        model: the open_clip model with the small token table.
        rows: (V,) which tokens its rows are.
        path: a safetensors file.
    """
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    with replacing(path) as scratch:
        safetensors.torch.save_file({**state, clip.ROWS: rows}, scratch)


def train(worker: int, workers: int, epochs: int, batch_size: int, lr: float, seed: int, out: Path) -> None:
    """The loop of one worker of `workers`, each with its share of every batch and its own negatives.

    Every few minutes worker 0 writes a checkpoint beside `out`; a stopped run goes on from it.

    Args:
        worker: rank of this process.
        workers: number of processes.
        epochs: passes over the corpus.
        batch_size: images a worker and step.
        lr: peak learning rate of AdamW; linear warm-up over a thirtieth of the steps, then a cosine to zero.
        seed: of initialisation, order and augmentation.
        out: the weights file.
    """
    torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    dist.init_process_group("gloo", rank=worker, world_size=workers)
    torch.manual_seed(seed)
    pair = _Pair()
    images, captions = corpus()
    numbers = {caption: number for number, caption in enumerate(sorted(set(captions)))}
    caption = torch.tensor([numbers[c] for c in captions])  # (N,)
    texts = [template.format(c) for template in TEMPLATES for c in numbers]
    rows, compact = pair.tokenizer(texts).unique(return_inverse=True)  # the end token keeps the largest id
    tokens = compact.view(len(TEMPLATES), len(numbers), -1)  # (templates, captions, context)
    pair.model.token_embedding = nn.Embedding(len(rows), pair.model.token_embedding.embedding_dim)
    nn.init.normal_(pair.model.token_embedding.weight, std=0.02)
    mono = (images.amax(1) == images.amin(1)).flatten(1).all(1)  # (N,)

    decay = [p for p in pair.parameters() if p.ndim >= 2]
    rest = [p for p in pair.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    per_epoch = len(images) // (batch_size * workers)
    total = epochs * per_epoch
    losses = torch.zeros(total)
    code = keys.code_of(train)
    decides = [workers, epochs, batch_size, lr, seed, corpus_fingerprint(), code]
    partial_file = out.with_name(f".{out.stem}.{keys.key(decides)}.partial.safetensors")
    tensors = {"losses": losses, **{f"theta/{name}": p for name, p in pair.named_parameters()}}
    start, spent = 0, 0.0
    if partial_file.exists():
        facts = checkpoint.load(partial_file, "pre-training", tensors, optimizer)
        start, spent = facts["step"], facts["seconds"]
    both = DistributedDataParallel(pair)
    begun = saved = time.monotonic()
    for step in range(start, total):
        index = batch_indices(len(images), workers * batch_size, seed, step).chunk(workers)[worker]
        draw = generator("pretrain view", seed, step * workers + worker)
        view = augment(images[index].float() / 255, mono[index], draw)
        which = torch.randint(len(TEMPLATES), (len(index),), generator=draw)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, total, lr, 1 / 30)
        image, text, scale = both(view, tokens[which, caption[index]])
        loss = contrastive_loss(image, text, caption[index], scale)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(pair.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            pair.model.logit_scale.clamp_(max=LARGEST_LOGIT_SCALE)
        losses[step] = loss.item()
        if worker == 0 and (step + 1) % per_epoch == 0:
            now = time.monotonic()
            rate = (step + 1 - start) / (now - begun)  # steps a second
            mean = losses[step + 1 - per_epoch : step + 1].mean().item()
            left = (total - step - 1) / rate / 60  # minutes
            speed = rate * batch_size * workers
            done = (step + 1) // per_epoch
            print(f"epoch {done}/{epochs}: loss {mean:.3f}, {speed:.0f} images/s, {left:.0f} minutes left", flush=True)
            if now - saved > CHECKPOINT_SECONDS and step + 1 < total:
                facts = {"step": step + 1, "seconds": spent + now - begun}
                checkpoint.save(partial_file, "pre-training", tensors, optimizer, facts)
                saved = now
    if worker == 0:
        save(pair.model, rows.int(), out)
        partial_file.unlink(missing_ok=True)
    dist.destroy_process_group()


def main() -> None:
    """Command line of the pre-training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=256, help="images a worker and step")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--out", type=Path, default=registry.WEIGHTS)
    a = parser.parse_args()
    mp.spawn(train, (a.workers, a.epochs, a.batch_size, a.lr, a.seed, a.out), nprocs=a.workers)


if __name__ == "__main__":
    main()


CORPUS = ("corpus", "corpus_patches")  # folders of captioned images


def corpus() -> tuple[Tensor, list[str]]:
    """The captioned images on which the testbed's model was pre-trained.

    Returns:
        Images, uint8 (N, 3, 32, 32), and their N captions.

    Taught in: 03_models_and_tasks.
    """
    from samlib.data import folders

    found = [folders.read(_file(FOLDER / folder, "train")) for folder in CORPUS]
    return torch.cat([_pixels(table) for table in found]), [c for table in found for c in table["caption"]]


def corpus_fingerprint() -> str:
    """SHA-256 over the corpus's files."""
    files = [_file(FOLDER / folder, "train") for folder in CORPUS]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
