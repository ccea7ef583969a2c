"""What decides a fine-tuned model, and what its values may be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from samlib.rules import Rule, check, choice, none, number, whole

OPTIMIZERS = ("adamw", "sam", "asam", "rwp")
AVERAGES = ("none", "ema", "swa")
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # name -> torch's
SWA_SHARE = 0.25  # of the steps at the end, whose weights SWA averages


def _names(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and all(isinstance(name, str) for name in value)


RULES = {
    "tasks": Rule("one or more names, such as ('digits',)", _names),
    "optimizer": choice(*OPTIMIZERS),
    "steps": whole(1),
    "rho": number(0),
    "eta": number(0),
    "scale_biases": choice(True, False),
    "every": whole(1),
    "norms_only": choice(True, False),
    "lr": number(0, open_low=True),
    "weight_decay": number(0),
    "warmup": number(0, 1, open_high=True),
    "batch_size": whole(1),
    "micro_batch": whole(1) | none,
    "shared_climb": choice(True, False),
    "clip_norm": number(0, open_low=True) | none,
    "average": choice(*AVERAGES),
    "decay": number(0, 1, open_low=True, open_high=True),
    "n_train": whole(1) | none,
    "label_noise": number(0, 1, open_high=True),
    "seed": whole(0),
    "precision": choice(*PRECISIONS),
    "validate_every": whole(1) | none,
    "diagnose": choice(True, False),
}


@dataclass(frozen=True)
class Recipe:
    """All that decides a fine-tuned model, apart from the pre-trained one.

    Args:
        tasks: names that `tasks.load_task` knows, in most cases one (which may be given as it is); several train one
            model on all of them, which take turns, a batch of each after the other.
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
        rules = dict(RULES)
        for names, matter, when in (
            (("rho", "every", "norms_only"), self.optimizer != "adamw", "for adamw"),
            (("eta", "scale_biases"), self.optimizer == "asam", "unless the optimizer is asam"),
            (("decay",), self.average == "ema", "unless the average is ema"),
        ):
            for name in names if not matter else ():  # a default has one key, whatever has no effect
                default = choice(getattr(Recipe, name))
                rules[name] = Rule(f"{default.text} {when}", default.holds)
        check("recipe", rules, vars(self))

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
