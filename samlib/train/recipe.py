"""What decides a fine-tuned model, and what its values may be."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from samlib.rules import is_whole as whole

OPTIMIZERS = ("adamw", "sam", "asam", "rwp")
AVERAGES = ("none", "ema", "swa")
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # name -> torch's
SWA_SHARE = 0.25  # of the steps at the end, whose weights SWA averages


@dataclass(frozen=True)
class Recipe:
    """All that decides a fine-tuned model, apart from the pre-trained one.

    Args:
        tasks: names that `tasks.load_task` knows, in most cases one (which may be given as it is); several train one model
            on all of them, which take turns, a batch of each after the other.
        optimizer: "adamw", "sam", "asam", or "rwp" (random weight perturbation: SAM that climbs along noise).
        steps: updates, >= 1.
        rho: radius, >= 0; 0 for AdamW.
        eta: floor of ASAM's scale, >= 0; 0 for the others.
        scale_biases: False leaves biases and norm layers out of ASAM's scaling.
        every: climb in every k-th step only, >= 1.
        norms_only: climb in the parameters of the norm layers only.
        lr: peak learning rate, > 0.
        weight_decay: AdamW's decoupled decay, >= 0.
        warmup: fraction of the steps with a rising learning rate, in [0, 1).
        batch_size: images a step, >= 1, over all processes.
        micro_batch: images in one forward pass, >= 1, or None for the whole batch of a process.
        shared_climb: True climbs once for all micro-batches and processes, False once for each (m-sharpness).
        clip_norm: largest norm of the update gradient, > 0, or None.
        average: weights to return: "none" for the last, "ema" for their exponential moving average, "swa" for the mean
            over the last quarter of the steps.
        decay: of the moving average, in (0, 1).
        n_train: train on at most this many examples, >= 1, or None for all.
        label_noise: share of the training labels that are replaced by another class, in [0, 1); drawn by the seed,
            at the same places in every task.
        seed: of data order, augmentation and noise, >= 0.
        precision: "fp32", or "bf16" or "fp16" for autocast over fp32 weights; fp16 scales the loss.
        validate_every: steps between looks at the validation split, >= 1, or None for no look.
        diagnose: log the climb's angle and length, too; a SAM step then costs about a tenth more.

    Raises:
        ValueError: a value is out of range.

    Taught in: 04_fine_tuning.
    """

    tasks: tuple[str, ...]
    optimizer: str
    steps: int
    rho: float = 0.0
    eta: float = 0.0
    scale_biases: bool = True
    every: int = 1
    norms_only: bool = False
    lr: float = 3e-4
    weight_decay: float = 0.1
    warmup: float = 0.1
    batch_size: int = 64
    micro_batch: int | None = None
    shared_climb: bool = False
    clip_norm: float | None = 1.0
    average: str = "none"
    decay: float = 0.99
    n_train: int | None = None
    label_noise: float = 0.0
    seed: int = 0
    precision: str = "fp32"
    validate_every: int | None = None
    diagnose: bool = False

    def __post_init__(self) -> None:
        tasks: object = self.tasks
        if isinstance(tasks, (str, list)):  # one name, or what JSON makes of a tuple
            object.__setattr__(self, "tasks", (tasks,) if isinstance(tasks, str) else tuple(tasks))
        for name in ("rho", "eta", "lr", "weight_decay", "warmup", "clip_norm", "decay", "label_noise"):
            if type(getattr(self, name)) is int:  # one key for 0 and 0.0
                object.__setattr__(self, name, float(getattr(self, name)))
        climbs, is_asam = self.optimizer != "adamw", self.optimizer == "asam"
        rules = {
            "tasks": (
                isinstance(self.tasks, tuple) and len(self.tasks) > 0 and all(isinstance(t, str) for t in self.tasks),
                "one or more names, such as ('digits',)",
            ),
            "optimizer": (self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            "steps": (whole(self.steps, 1), "an integer >= 1"),
            "rho": (0 <= self.rho < math.inf if climbs else self.rho == 0, ">= 0, and 0 for adamw"),
            "eta": (self.eta >= 0 if is_asam else self.eta == 0, ">= 0, and 0 unless the optimizer is asam"),
            "scale_biases": (self.scale_biases is True or is_asam, "True unless the optimizer is asam"),
            "every": (whole(self.every, 1) and (climbs or self.every == 1), "an integer >= 1, and 1 for adamw"),
            "norms_only": (self.norms_only is False or climbs, "False for adamw"),
            "lr": (self.lr > 0, "> 0"),
            "weight_decay": (self.weight_decay >= 0, ">= 0"),
            "warmup": (0 <= self.warmup < 1, "in [0, 1)"),
            "batch_size": (whole(self.batch_size, 1), "an integer >= 1"),
            "micro_batch": (self.micro_batch is None or whole(self.micro_batch, 1), "an integer >= 1 or None"),
            "clip_norm": (self.clip_norm is None or self.clip_norm > 0, "> 0 or None"),
            "average": (self.average in AVERAGES, f"one of {', '.join(AVERAGES)}"),
            "decay": (
                0 < self.decay < 1 and (self.decay == 0.99 or self.average == "ema"),
                "in (0, 1), 0.99 unless ema",
            ),
            "n_train": (self.n_train is None or whole(self.n_train, 1), "an integer >= 1 or None"),
            "label_noise": (0 <= self.label_noise < 1, "in [0, 1)"),
            "seed": (whole(self.seed, 0), "an integer >= 0"),
            "precision": (self.precision in PRECISIONS, "fp32, bf16 or fp16"),
            "validate_every": (self.validate_every is None or whole(self.validate_every, 1), "an integer >= 1 or None"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise ValueError(f"{name} must be {allowed}, not {getattr(self, name)!r}")

    @property
    def task(self) -> str:
        """The task's name; of several, all names."""
        return "+".join(self.tasks)

    @property
    def per_pass(self) -> int:
        """Images in one forward pass of a single process."""
        return min(self.micro_batch or self.batch_size, self.batch_size)

    def same(self) -> Recipe:
        """The recipe without what changes no result, so that a run may go on on a smaller device: it names results."""
        return replace(self, micro_batch=None) if self.shared_climb else self

    @property
    def gradients(self) -> int:
        """Gradients taken in all, the unit of cost: one a step, and one more where SAM climbs."""
        return self.steps + (-(-self.steps // self.every) if self.rho > 0 else 0)
