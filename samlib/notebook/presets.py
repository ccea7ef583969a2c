"""The sizes of a run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from samlib.data import catalogue
from samlib.model import registry


@dataclass(frozen=True)
class Preset:
    """The size of a run.

    Args:
        name: key in PRESETS.
        model: the pre-trained model, as `clip.load_clip` knows it.
        tasks: task names.
        seeds: one fine-tuning run a task and seed.
        steps: updates after which training has converged.
        lengths: multipliers of `steps` shown as the training-length axis.
        regimes: (length, n_train, label_noise) of the map of where SAM helps, length as a multiple of `steps`.
        radii: of SAM, in that map.
        n_hessian: images on which curvature is measured.
        batch_size: images a step.
        micro_batch: images in one forward pass: None for the whole batch, "auto" for as many as fit into the memory;
            with micro-batches SAM climbs once for the whole batch, so that their size changes no result.
        n_train, n_eval: at most this many training and evaluation examples, None for all.
        label_noise: share of the training labels that are replaced by another class, in [0, 1).
        lambdas: grid of task arithmetic's coefficient.
        lambdas_wide: grid for the methods that shrink the sum of the task vectors, such as TIES with its mean.
        xi_grid: values of a_1 and of a_2 in the disentanglement map.
        rho_sam, rho_asam: radii; those of the testbed were chosen on validation data by benchmarks/choose_rho.py,
            those of `paper` are the paper's.
        lr: peak learning rate.
        precision: of fine-tuning: "fp32", "bf16" (autocast over fp32 weights, which rounds small SAM steps
            away, see benchmarks/bf16_perturbation.py), or "auto": bf16 where the device computes it natively, else
            fp16 on a GPU and fp32 on the CPU.
        jobs: processes on the CPU, None for one a core.
        note: what the preset costs.
    """

    name: str
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    lengths: tuple[float, ...]
    batch_size: int
    n_train: int | None
    n_eval: int | None
    lambdas: tuple[float, ...]
    lambdas_wide: tuple[float, ...]
    xi_grid: tuple[float, ...]
    rho_sam: float
    rho_asam: float
    lr: float
    precision: str
    jobs: int | None
    note: str
    regimes: tuple[tuple[float, int, float], ...]
    radii: tuple[float, ...]
    n_hessian: int
    label_noise: float = 0.0
    model: str = registry.TESTBED
    micro_batch: int | str | None = None


_LAMBDAS = (0.0, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.7, 1.0)
_WIDE = (*_LAMBDAS, 1.5, 2.0, 3.0)


def _grid(low: float, high: float, n: int) -> tuple[float, ...]:
    return tuple(round(low + (high - low) * i / (n - 1), 10) for i in range(n))


_PUBLISHED = Preset(
    name="published",
    tasks=catalogue.TASKS,
    seeds=(0, 1, 2, 3, 4),
    steps=768,
    lengths=(1 / 3, 1.0, 4.0),
    batch_size=16,
    n_train=1000,
    n_eval=None,
    lambdas=_LAMBDAS,
    lambdas_wide=_WIDE,
    xi_grid=_grid(-2, 2, 15),
    rho_sam=0.005,
    rho_asam=0.05,
    lr=5e-4,
    precision="fp32",
    jobs=None,
    note="about seven hours on two cores, resumable; three to five seeds, the numbers in the book",
    regimes=((1 / 8, 1000, 0.0), (1 / 3, 1000, 0.0), (1.0, 1000, 0.0), (1 / 3, 250, 0.0), (1 / 3, 1000, 0.3)),
    radii=(0.005, 0.02, 0.05),
    n_hessian=100,
)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="smoke",
            tasks=("digits", "emoji", "climates"),
            seeds=(0,),
            steps=10,
            lengths=(0.5, 1.0),
            batch_size=32,
            n_train=200,
            n_eval=100,
            lambdas=_grid(0, 1, 5),
            lambdas_wide=_grid(0, 2, 3),
            xi_grid=_grid(-2, 2, 3),
            rho_sam=0.005,
            rho_asam=0.05,
            lr=3e-4,
            precision="fp32",
            jobs=None,
            note="minutes; shows that everything runs, its numbers mean nothing",
            regimes=((1.0, 200, 0.0), (1.0, 100, 0.3)),
            radii=(0.005,),
            n_hessian=20,
        ),
        dataclasses.replace(  # one seed of the published recipe, cut short: intervals come from the published runs
            _PUBLISHED,
            name="laptop",
            seeds=(0,),
            steps=256,
            lengths=(1.0,),
            xi_grid=_grid(-2, 2, 9),
            note="longer than smoke, a fraction of published; one seed, training cut short",
            regimes=((1.0, 1000, 0.0),),
            radii=(0.005, 0.02),
            n_hessian=50,
        ),
        _PUBLISHED,
        Preset(
            name="paper",
            tasks=("sun397", "stanford_cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"),
            seeds=(0,),
            steps=8000,
            lengths=(0.25, 1.0),
            batch_size=128,
            n_train=None,
            n_eval=None,
            lambdas=_grid(0, 1, 21),
            lambdas_wide=_grid(0, 3, 16),
            xi_grid=_grid(-2, 2, 20),
            rho_sam=0.05,
            rho_asam=0.5,
            lr=1e-5,
            precision="fp32",  # in bf16 most of a climb of this radius would be rounded away
            jobs=1,
            model="ViT-B-32/openai",
            micro_batch="auto",
            note="open_clip ViT-B-32 (openai) on the eight hub tasks, a GPU and days; chapter 4 estimates them first",
            regimes=((0.25, 10000, 0.0), (1.0, 10000, 0.0), (1.0, 1000, 0.0), (1.0, 10000, 0.3)),
            radii=(0.01, 0.05, 0.2),
            n_hessian=500,
        ),
    )
}
