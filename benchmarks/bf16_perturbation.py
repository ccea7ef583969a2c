"""How much of SAM's step survives bf16 autocast: `python -m benchmarks.bf16_perturbation`.

Autocast rounds the weights to bf16 before each multiplication, at w and at w + eps alike. What the network then
sees of the step is bf16(w + eps) - bf16(w): this prints the share of the weights that move at all, the cosine of
that difference with eps, and its length over rho, on the testbed's encoder and one batch.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from samlib.data.tasks import load_task
from samlib.model.clip import load_clip
from samlib.model.head import zero_shot_head


def main() -> None:
    """Print one line a radius."""
    clip = load_clip()
    task = load_task("flags")
    encoder = clip.encoder.requires_grad_(True)
    head = zero_shot_head(clip, task)
    cross_entropy(encoder(task.train.images[:32]) @ head.T, task.train.labels[:32]).backward()
    w = torch.cat([p.detach().flatten() for p in encoder.parameters()])
    g = torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])
    for rho in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5):
        eps = rho * g / g.norm()
        seen = (w + eps).bfloat16().float() - w.bfloat16().float()
        moved, cosine = (seen != 0).float().mean().item(), cosine_similarity(seen, eps, dim=0).item()
        print(f"rho {rho:g}: {100 * moved:.1f} % move, cosine {cosine:.2f}, length {seen.norm().item() / rho:.2f} rho")


if __name__ == "__main__":
    main()
