"""Every merging method against an independent implementation, or against its definition computed the slow way.

On random task vectors and on real ones: of the testbed's model, fine-tuned for a few steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from samlib import merge
from samlib.data import batches
from samlib.data.tasks import load_task
from samlib.model.clip import load_clip
from samlib.model.head import zero_shot_head
from samlib.model.theta import weights_of
from samlib.train import finetune
from samlib.train.recipe import Recipe

Theta = dict[str, Tensor]
TASKS = ("digits", "flags", "textures")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Theta, list[Theta]]:
    model = load_clip()
    recipes = [Recipe(task, "adamw", steps=6, lr=5e-4, batch_size=16, n_train=100) for task in TASKS]
    done = [finetune.finetune(recipe, model, "cpu", tmp_path_factory.mktemp("cache")) for recipe in recipes]
    return weights_of(model.encoder), [d.theta for d in done]


@pytest.fixture(scope="module")
def random() -> tuple[Theta, list[Theta]]:
    torch.manual_seed(0)

    def draw(scale: float) -> Theta:
        shapes = {"a.weight": (24, 40), "b.weight": (40, 24), "b.bias": (40,), "stem.weight": (4, 3, 5, 5)}
        return {name: scale * torch.randn(shape) for name, shape in shapes.items()}

    theta_0 = draw(1.0)
    return theta_0, [
        {name: w + tau for (name, w), tau in zip(theta_0.items(), draw(0.1).values(), strict=True)} for _ in range(4)
    ]


@pytest.fixture(params=["random", "real"])
def case(request: pytest.FixtureRequest) -> tuple[Theta, list[Theta]]:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def added(theta_0: Theta, tau: Theta, lam: float = 1.0) -> Theta:
    return {name: w + lam * tau[name] for name, w in theta_0.items()}


def vectors(theta_0: Theta, thetas: Sequence[Theta]) -> list[Theta]:
    return [{name: theta[name] - w for name, w in theta_0.items()} for theta in thetas]


def agree(ours: Theta, theirs: Theta, tolerance: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, w in ours.items():
        torch.testing.assert_close(w, theirs[name], rtol=0, atol=tolerance)


def mergekit(method: str, theta_0: Theta, thetas: Sequence[Theta], **parameters: Any) -> Theta:
    from mergekit.merge_methods import merge_state_dicts

    models = {"base": theta_0} | {str(t): theta for t, theta in enumerate(thetas)}
    if method == "linear":
        del models["base"]
    base = None if method == "linear" else "base"
    return merge_state_dicts(models, method, base=base, parameters=parameters)


def test_average(case: tuple[Theta, list[Theta]]) -> None:
    agree(merge.average(*case), mergekit("linear", *case, weight=1.0))


@pytest.mark.parametrize("lam", [0.3, 1.0, -0.5])
def test_task_arithmetic(case: tuple[Theta, list[Theta]], lam: float) -> None:
    theirs = mergekit("task_arithmetic", *case, weight=1.0, normalize=False, **{"lambda": lam})
    agree(merge.task_arithmetic(*case, lam=lam), theirs)


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_ties_flat(case: tuple[Theta, list[Theta]], how: str) -> None:
    """Theirs keeps int(density P) + 1 entries, and all that equal the smallest of these; ours as many as asked."""
    from fusion_bench.method.ties_merging import ties_merging_utils as theirs

    theta_0, thetas = case
    taus = vectors(theta_0, thetas)
    flat = torch.stack([theirs.state_dict_to_vector(tau) for tau in taus])  # (T, P), by name
    P = flat.shape[1]
    k = int(P * 0.2) + 1
    smallest = flat.abs().kthvalue(P - k + 1, dim=1, keepdim=True).values
    expected = theirs.ties_merging(flat.clone(), reset_thresh=0.2, merge_func=how) * 0.7
    merged = theirs.state_dict_to_vector(merge.ties(theta_0, thetas, 0.7, (k + 0.5) / P, merge=how))
    same = (flat.abs() != smallest).all(0)
    assert (~same).sum() <= 2 * len(thetas)
    start = theirs.state_dict_to_vector(theta_0)
    torch.testing.assert_close((merged - start)[same], expected[same], rtol=0, atol=1e-6)


def test_ties_trimmed_per_tensor(random: tuple[Theta, list[Theta]]) -> None:
    """Random numbers only: where several entries share the smallest magnitude that fits, theirs keeps any of them."""
    theirs = mergekit("ties", *random, weight=1.0, density=0.3, **{"lambda": 0.7})
    agree(merge.ties(*random, lam=0.7, density=0.3, trim="tensor"), theirs)


def test_model_stock(case: tuple[Theta, list[Theta]]) -> None:
    agree(merge.model_stock(*case), mergekit("model_stock", *case), 1e-5)


def test_dare_has_their_distribution_and_its_own_definition(
    random: tuple[Theta, list[Theta]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both draw for themselves: the same mask must give the same, and the share that stays must be right."""
    from fusion_bench.method.dare.utils import param_random_drop_

    theta_0, thetas = random
    merged = merge.dare(theta_0, thetas[:1], lam=1.0, drop=0.75, seed=3)
    tau, kept = vectors(theta_0, [thetas[0], merged])
    mask = {name: (kept[name].abs() > 1e-7) for name in theta_0}
    n, share = sum(m.numel() for m in mask.values()), 0.25
    assert abs(sum(int(m.sum()) for m in mask.values()) / n - share) < 4 * math.sqrt(share * (1 - share) / n)
    for name, mine in kept.items():
        monkeypatch.setattr(torch, "rand_like", lambda w, name=name: mask[name].float() * 0.5 + 0.5)
        theirs = nn.Parameter(tau[name].clone())
        param_random_drop_(theirs, 0.75, rescale=True)
        torch.testing.assert_close(mine, theirs.data, rtol=0, atol=1e-6)
    other = merge.dare(theta_0, thetas[:1], lam=1.0, drop=0.75, seed=4)
    assert not torch.equal(other["a.weight"], merged["a.weight"])
    masks = [merge.dare(theta_0, [thetas[0]] * 2, lam=1.0, drop=0.75, seed=s)["a.weight"] for s in range(2)]
    assert not torch.equal(*masks)


def test_dare_then_ties_is_ties_of_the_dropped_task_vectors(random: tuple[Theta, list[Theta]]) -> None:
    theta_0, thetas = random
    dropped = [merge.linear.dropped(theta_0, theta, 0.5, f"0/{t}") for t, theta in enumerate(thetas)]
    agree(
        merge.dare(theta_0, thetas, lam=0.9, drop=0.5, then="ties"),
        merge.ties(theta_0, [dict(one) for one in dropped], lam=0.9),
        1e-5,
    )


def test_tsv_m(case: tuple[Theta, list[Theta]]) -> None:
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction

    theirs = compute_and_sum_svd_mem_reduction(vectors(*case), accelerator="cpu")
    agree(merge.tsv_m(*case), added(case[0], theirs), 1e-5)


def test_iso_c(case: tuple[Theta, list[Theta]]) -> None:
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c

    agree(merge.iso_c(*case, lam=0.8), added(case[0], iso_c(vectors(*case), accelerator="cpu"), 0.8), 1e-5)


@pytest.mark.parametrize("common", [0.8, 0.5, 1.0])
def test_iso_cts(case: tuple[Theta, list[Theta]], common: float) -> None:
    from fusion_bench.method.isotropic_merging.iso_utils import iso_cts

    theirs = iso_cts(vectors(*case), common_space_fraction=common, accelerator="cpu")
    agree(merge.iso_cts(*case, common=common), added(case[0], theirs), 1e-5)


def test_wudi(case: tuple[Theta, list[Theta]]) -> None:
    from fusion_bench.method.wudi.wudi import wudi_merging

    theirs = wudi_merging(vectors(*case), accelerator="cpu", iter_num=30)
    agree(merge.wudi(*case, steps=30), added(case[0], {name: w.detach() for name, w in theirs.items()}), 1e-5)


def test_wudi_comes_nearer_to_its_minimum(random: tuple[Theta, list[Theta]]) -> None:
    """The minimum solves linear equations: tau (sum G_t / n_t) = sum tau_t G_t / n_t."""
    theta_0, thetas = random
    taus = torch.stack([theta["a.weight"] - theta_0["a.weight"] for theta in thetas]).double()
    grams = torch.stack([tau.T @ tau / tau.square().sum() for tau in taus])
    best = torch.linalg.lstsq(grams.sum(0), (taus @ grams).sum(0).T, driver="gelsd").solution.T

    def objective(tau: Tensor) -> float:
        terms = [((tau - t) @ t.T).square().sum() / t.square().sum() for t in taus]
        return float(torch.stack(terms).sum())

    start, least = objective(taus.sum(0)), objective(best)
    found = merge.wudi(theta_0, thetas, steps=300, lr=1e-2)["a.weight"] - theta_0["a.weight"]
    assert least < objective(found.double()) < least + 0.02 * (start - least)


def test_consensus_by_its_definition(case: tuple[Theta, list[Theta]]) -> None:
    theta_0, thetas = case
    merged = merge.consensus(theta_0, thetas, lam=0.4, mask_lam=0.6, agree=2)
    for name in list(theta_0)[:3]:
        taus = [(theta[name] - theta_0[name]).flatten().tolist() for theta in thetas]
        entries = []
        for p, w in enumerate(theta_0[name].flatten().tolist()):
            total = sum(tau[p] for tau in taus)
            votes = sum(abs(tau[p]) >= 0.6 * abs(total - tau[p]) for tau in taus)
            entries.append(w + 0.4 * total * (votes >= 2))
        close = (merged[name].flatten() - torch.tensor(entries)).abs() < 1e-6
        assert close.float().mean() > 0.999  # in fp32 an entry on the border may fall to the other side


def inputs(n: int = 24) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    model = load_clip()
    loaded = [load_task(name) for name in TASKS]
    heads = [zero_shot_head(model, task) for task in loaded]
    return model.encoder, [task.validation.images[:n] for task in loaded], heads


def test_regmean(real: tuple[Theta, list[Theta]]) -> None:
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights

    encoder, images, heads = inputs()
    theta_0, thetas = real
    grams = [merge.with_images.input_grams(encoder, theta, x) for theta, x in zip(thetas, images, strict=True)]
    assert {name.split(".")[-2] for name in grams[0]} == {"qkv", "proj", "fc1", "fc2"}
    assert len(grams[0]) == 17  # four in each of four blocks, and the projection at the end
    modules = [{name.removesuffix(".weight"): g.double() for name, g in one.items()} for one in grams]
    wide = {name: [theta[name].double() for theta in thetas] for name in theta_0}
    theirs = merging_with_regmean_weights(wide, modules, reduce_non_diagonal_ratio=0.95)
    double = [{name: w.double() for name, w in theta.items()} for theta in (theta_0, *thetas)]
    ours = merge.regmean(encoder.double(), double[0], double[1:], [x.double() / 255 for x in images], heads)
    agree(ours, theirs, 1e-5)


def test_the_grams_are_those_of_the_inputs(real: tuple[Theta, list[Theta]]) -> None:
    """Of one layer, caught by hand; and for shrink = 1 the layer is the least-squares solution."""
    encoder, images, heads = inputs(6)
    theta_0, thetas = real
    layer = next(name for name, m in encoder.named_modules() if isinstance(m, nn.Linear) and name.endswith("fc1"))
    caught: list[Tensor] = []
    hook = encoder.get_submodule(layer).register_forward_hook(lambda m, x, y: caught.append(x[0].flatten(0, -2)))
    with torch.no_grad():
        for theta, x in zip(thetas, images, strict=True):
            functional_call(encoder, theta, (x,))
    hook.remove()
    gram = merge.with_images.input_grams(encoder, thetas[1], images[1], batch_size=4)[f"{layer}.weight"]
    torch.testing.assert_close(gram, caught[1].T @ caught[1] / len(caught[1]))
    merged = merge.regmean(encoder, theta_0, thetas, images, heads, shrink=0.9)[f"{layer}.weight"].double()
    shrunk = [(c.T @ c / len(c)).double() for c in caught]
    shrunk = [0.9 * g + 0.1 * g.diag().diag() for g in shrunk]
    pull = [theta[f"{layer}.weight"].double() @ g for theta, g in zip(thetas, shrunk, strict=True)]
    residual = (merged @ sum(shrunk) - sum(pull)).abs().max()  # of the normal equations
    assert residual < 1e-5 * sum(pull).abs().max()


def test_fisher_by_single_gradients(real: tuple[Theta, list[Theta]]) -> None:
    """One backward pass an image, labels drawn in the same order."""
    encoder, images, heads = inputs(5)
    theta_0, thetas = real
    numerator = {name: torch.zeros_like(w) for name, w in theta_0.items()}
    denominator = {name: torch.zeros_like(w) for name, w in theta_0.items()}
    for theta, x, head in zip(thetas, images, heads, strict=True):
        draw = torch.Generator().manual_seed(1)
        leaves = {name: w.clone().requires_grad_() for name, w in theta.items()}
        squares = {name: torch.zeros_like(w) for name, w in theta.items()}
        for image in x:
            log_p = (functional_call(encoder, leaves, (image[None],)) @ head.T).log_softmax(1)[0]
            label = int(torch.multinomial(log_p.detach().exp(), 1, generator=draw))
            for name, g in zip(leaves, torch.autograd.grad(log_p[label], list(leaves.values())), strict=True):
                squares[name] += g.square() / len(x)
        for name in theta_0:
            numerator[name] += (squares[name] + 1e-8) * theta[name]
            denominator[name] += squares[name] + 1e-8
    expected = {name: n / denominator[name] for name, n in numerator.items()}
    agree(merge.fisher(encoder, theta_0, thetas, images, heads, seed=1, chunk=1), expected, 1e-5)
    agree(merge.fisher(encoder, theta_0, thetas, images, heads, seed=1, chunk=4, floor=1e6), merge.average(*real), 1e-5)


@pytest.mark.parametrize(("by_tensor", "objective"), [(True, "entropy"), (False, "kl")])
def test_adamerging_step_by_step(real: tuple[Theta, list[Theta]], by_tensor: bool, objective: str) -> None:
    """Coefficients as separate numbers, plain Adam on their gradients by central differences in fp64."""
    encoder, images, heads = inputs(8)
    encoder, heads = encoder.double(), [head.double() for head in heads]
    theta_0, *thetas = [{name: w.double() for name, w in theta.items()} for theta in (real[0], *real[1])]
    images = [x.double() / 255 for x in images]
    names, T = list(theta_0), len(thetas)

    def merged(lams: Tensor) -> Theta:
        lams = lams.expand(T, len(names))
        return {
            n: theta_0[n] + sum(lams[t, i] * (thetas[t][n] - theta_0[n]) for t in range(T)) for i, n in enumerate(names)
        }

    @torch.no_grad()
    def loss(lams: Tensor, step: int) -> float:
        total, model = 0.0, merged(lams)
        for t in range(T):
            x = images[t][batches.batch_indices(8, 4, 5, step)]
            p = (functional_call(encoder, model, (x,)) @ heads[t].T).softmax(1)
            if objective == "entropy":
                total -= float((p * p.log()).sum(1).mean())
            else:
                q = (functional_call(encoder, thetas[t], (x,)) @ heads[t].T).softmax(1)
                total += float((q * (q / p).log()).sum(1).mean())
        return total

    lams = torch.full((T, len(names) if by_tensor else 1), 0.3, dtype=torch.float64)
    adam = torch.optim.Adam([lams], 0.01)
    places = [(t, i) for t in range(T) for i in range(lams.shape[1])]
    for step in range(2 if not by_tensor else 1):
        lams.grad = torch.zeros_like(lams)
        for place in places:
            ends = []
            for sign in (1, -1):
                moved = lams.clone()
                moved[place] += sign * 1e-4
                ends.append(loss(moved, step))
            lams.grad[place] = (ends[0] - ends[1]) / 2e-4
        adam.step()
    ours = merge.adamerging(
        encoder, theta_0, thetas, images, heads, by_tensor, objective, steps=step + 1, lr=0.01, batch_size=4, seed=5
    )
    agree(ours, merged(lams), 1e-6)
    kl = {"by_tensor": by_tensor, "objective": objective, "steps": 2, "lr": 0.01, "batch_size": 4}
    plain, sam = (merge.adamerging(encoder, theta_0, thetas, images, heads, rho=rho, **kl) for rho in (0.0, 0.5))
    assert max((plain[n] - sam[n]).abs().max().item() for n in names) > 1e-9


def test_sam_at_merge_time_measures_where_the_weights_are_merged_anew(real: tuple[Theta, list[Theta]]) -> None:
    """One step of SGD-like Adam is too coarse to see a gradient: compare the sign pattern and the climb by hand."""
    encoder, images, heads = inputs(6)
    theta_0, thetas = real
    seen: list[float] = []

    def watch(module: nn.Module, x: Any, y: Any) -> None:
        seen.append(float(module.weight.detach().double().sum()))  # type: ignore[operator]

    layer = next(m for name, m in encoder.named_modules() if name.endswith("fc1"))
    hook = layer.register_forward_hook(watch)
    merge.adamerging(encoder, theta_0, thetas, images, heads, by_tensor=False, rho=0.5, steps=1, batch_size=6)
    hook.remove()
    assert len(seen) == 2 * len(thetas) and len(set(seen)) == 2  # three tasks at lam, then at lam + eps
