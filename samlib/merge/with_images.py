"""Methods that look at images, never at their labels: Fisher, RegMean, AdaMerging, SAM at merge time.

All share one signature: the encoder, theta_0 and the fine-tuned weights, then images and a classification head a task.
Fisher and RegMean take theta_0 for the checks only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from tqdm.auto import tqdm

from samlib.data import batches
from samlib.merge.method import with_images
from samlib.model.theta import Theta, Weights
from samlib.rules import choice, number, whole
from samlib.train.sam import SAM


@with_images("Matena and Raffel 2022, eq. 3 and 6", seed=whole(0), floor=number(0, open_low=True), chunk=whole(1))
def fisher(
    encoder: nn.Module,
    theta_0: Weights,
    thetas: Sequence[Weights],
    images: Sequence[Tensor],
    heads: Sequence[Tensor],
    seed: int = 0,
    floor: float = 1e-8,
    chunk: int = 8,
) -> Theta:
    """Fisher merging: an average in which each weight counts by how much its task's predictions depend on it.

    sum_t F_t theta_t / sum_t F_t entry by entry, where F_t is the mean over the images of the squared gradient of
    log p(y | x; theta_t), of one image at a time, with y drawn from the model's own prediction.

    Args:
        seed: of the drawn labels.
        floor: added to every F, > 0, so that entries on which no prediction depends are averaged.
        chunk: images whose gradients are held at once, >= 1.
    """
    numerator = {name: torch.zeros_like(w) for name, w in theta_0.items()}
    denominator = {name: torch.zeros_like(w) for name, w in theta_0.items()}
    for t, theta in enumerate(thetas):
        importance = fisher_information(encoder, theta, images[t], heads[t], seed, chunk)
        for name, f in importance.items():
            numerator[name] += (f + floor) * theta[name]
            denominator[name] += f + floor
    return {name: n / denominator[name] for name, n in numerator.items()}


def fisher_information(
    encoder: nn.Module, theta: Weights, images: Tensor, head: Tensor, seed: int = 0, chunk: int = 8
) -> Theta:
    """The diagonal of the Fisher information matrix, E[(d log p(y | x) / d theta)^2], one label y drawn an image.

    Arguments as for `fisher`, of one task. What is returned is shaped as theta, and >= 0.
    """
    encoder.eval()
    draw = torch.Generator().manual_seed(seed)
    theta = dict(theta)

    def log_likelihood(theta: Theta, image: Tensor, label: Tensor) -> Tensor:
        return -F.cross_entropy(functional_call(encoder, theta, (image[None],)) @ head.T, label[None])

    gradients = vmap(grad(log_likelihood), (None, 0, 0))
    total = {name: torch.zeros_like(w) for name, w in theta.items()}
    for part in images.split(chunk):
        part = part.to(head.device)
        with torch.no_grad():
            probabilities = (functional_call(encoder, theta, (part,)) @ head.T).softmax(1)
        labels = torch.multinomial(probabilities.cpu(), 1, generator=draw)[:, 0].to(head.device)
        for name, g in gradients(theta, part, labels).items():
            total[name] += g.square().sum(0)
    return {name: value / len(images) for name, value in total.items()}


@with_images("Jin et al. 2023, section 3", shrink=number(0, 1), batch_size=whole(1))
@torch.no_grad()
def regmean(
    encoder: nn.Module,
    theta_0: Weights,
    thetas: Sequence[Weights],
    images: Sequence[Tensor],
    heads: Sequence[Tensor],
    shrink: float = 0.95,
    batch_size: int = 256,
) -> Theta:
    """RegMean: linear layers whose outputs are nearest to those of each fine-tuned model on its own inputs.

    For a layer with inputs X_t and weights W_t, sum_t ||X_t W^T - X_t W_t^T||^2 is least at
    W = (sum_t W_t G_t)(sum_t G_t)^-1, with G_t = X_t^T X_t / N whose off-diagonal entries are multiplied by `shrink`.
    Everything that is not the weight of a linear layer is averaged. The heads are not used.

    Args:
        shrink: factor of the off-diagonal entries, in [0, 1]; 1 is the exact least-squares solution.
        batch_size: images in one forward pass, >= 1.
    """
    merged = {name: torch.stack([theta[name] for theta in thetas]).mean(0) for name in theta_0}
    grams = [input_grams(encoder, theta, x, batch_size) for theta, x in zip(thetas, images, strict=True)]
    for name in grams[0]:
        shrunk = [g * shrink + g.diag().diag() * (1 - shrink) for g in (one[name].double() for one in grams)]
        mean = merged[name].double()  # solved around it: what no input ever reaches is averaged
        pull = torch.stack([(theta[name].double() - mean) @ g for theta, g in zip(thetas, shrunk, strict=True)]).sum(0)
        inverse = torch.linalg.pinv(torch.stack(shrunk).sum(0), hermitian=True)
        merged[name] = (mean + pull @ inverse).to(merged[name].dtype)
    return merged


@torch.no_grad()
def input_grams(encoder: nn.Module, theta: Weights, images: Tensor, batch_size: int = 256) -> Theta:
    """X^T X / N of the inputs of every linear layer that the forward pass calls, N counting the tokens of all images.

    Arguments as for `regmean`, of one task. What is returned is (n, n) for a weight (m, n), by its name.
    """
    encoder.eval()
    sums: Theta = {}
    rows: dict[str, int] = {}

    def look(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2)  # (tokens, n)
        sums[name] = sums.get(name, torch.zeros((), device=x.device)) + x.T @ x
        rows[name] = rows.get(name, 0) + len(x)

    hooks = [
        module.register_forward_pre_hook(partial(look, f"{name}.weight"))
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in theta
    ]
    try:
        for part in images.split(batch_size):
            functional_call(encoder, dict(theta), (part.to(next(iter(theta.values())).device),))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / rows[name] for name, total in sums.items()}


@with_images(
    "Yang et al. 2024, section 3.3 (AdaMerging); with rho > 0 also Foret et al. 2021 (SAM)",
    by_tensor=choice(True, False),
    objective=choice("entropy", "kl"),
    rho=number(0),
    start=number(),
    steps=whole(0),
    lr=number(0, open_low=True),
    batch_size=whole(1),
    seed=whole(0),
)
def adamerging(
    encoder: nn.Module,
    theta_0: Weights,
    thetas: Sequence[Weights],
    images: Sequence[Tensor],
    heads: Sequence[Tensor],
    by_tensor: bool = True,
    objective: str = "entropy",
    rho: float = 0.0,
    start: float = 0.3,
    steps: int = 100,
    lr: float = 1e-3,
    batch_size: int = 16,
    seed: int = 0,
) -> Theta:
    """Task arithmetic with a coefficient for every task (and tensor), learned on unlabelled images by Adam.

    theta_0 + sum_t lam_t tau_t. AdaMerging minimises the entropy of the merged model's predictions.
    With objective "kl" the merged model learns to predict as each task's own model does. With rho > 0, SAM does that
    over the coefficients: the weights are merged anew at the perturbed coefficients, for the gradient that updates.

    Args:
        by_tensor: True for one coefficient a task and tensor, False for one a task.
        objective: "entropy", or "kl" from the fine-tuned models.
        rho: radius of SAM in the space of coefficients, >= 0; 0 for plain Adam.
        start: of all coefficients.
        steps: of Adam, >= 0.
        lr: of Adam, > 0.
        batch_size: images of each task in a step, >= 1.
        seed: of the order of the images.
    """
    encoder.eval()
    device, dtype = heads[0].device, heads[0].dtype
    taus = {name: torch.stack([theta[name] - w for theta in thetas]).to(device) for name, w in theta_0.items()}
    lams = torch.full((len(thetas), len(taus) if by_tensor else 1), start, dtype=dtype, device=device)
    optimizer = SAM(torch.optim.Adam([lams.requires_grad_()], lr), rho)

    def merged() -> Theta:
        columns = lams.expand(-1, len(taus)).unbind(1)  # of every tensor one coefficient a task
        return {
            name: theta_0[name].to(device) + torch.tensordot(column, tau, 1)
            for (name, tau), column in zip(taus.items(), columns, strict=True)
        }

    def objective_of(t: int, model: Theta, batch: Tensor) -> Tensor:
        log_p = (functional_call(encoder, model, (batch,)) @ heads[t].T).log_softmax(1)
        if objective == "entropy":
            return -(log_p.exp() * log_p).sum(1).mean()
        with torch.no_grad():
            expert = (functional_call(encoder, dict(thetas[t]), (batch,)) @ heads[t].T).log_softmax(1)
        return F.kl_div(log_p, expert, reduction="batchmean", log_target=True)

    for step in tqdm(range(steps), "adapting coefficients", leave=False):
        picked = [x[batches.batch_indices(len(x), min(batch_size, len(x)), seed, step)].to(device) for x in images]

        def closure(picked: Sequence[Tensor] = picked) -> Tensor:
            model = merged()
            loss = torch.stack([objective_of(t, model, batch) for t, batch in enumerate(picked)]).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    with torch.no_grad():
        return merged()
