"""What decides a fine-tuned model, and what its values may be."""

from __future__ import annotations

from dataclasses import dataclass

OPTIMIZERS = ("adamw", "sam", "asam")


@dataclass(frozen=True)
class Recipe:
    """All that decides a fine-tuned model, apart from the pre-trained one.

    Args:
        task: name that `tasks.load` knows.
        optimizer: "adamw", "sam" or "asam".
        steps: updates, >= 1.
        rho: radius of SAM or ASAM, >= 0; 0 for AdamW.
        eta: floor of ASAM's scale, >= 0; 0 for the others.
        lr: peak learning rate, > 0.
        weight_decay: AdamW's decoupled decay, >= 0.
        warmup: fraction of the steps with a rising learning rate, in [0, 1).
        batch_size: images a step, >= 1.
        clip_norm: largest norm of the update gradient, > 0, or None.
        n_train: train on at most this many examples, >= 1, or None for all.
        seed: of data order and augmentation, >= 0.
        precision: "fp32", or "bf16" for autocast over fp32 weights.

    Raises:
        ValueError: a value is out of range.

    Taught in: 04_fine_tuning.
    """

    task: str
    optimizer: str
    steps: int
    rho: float = 0.0
    eta: float = 0.0
    lr: float = 3e-4
    weight_decay: float = 0.1
    warmup: float = 0.1
    batch_size: int = 64
    clip_norm: float | None = 1.0
    n_train: int | None = None
    seed: int = 0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        is_sam, is_asam = self.optimizer in ("sam", "asam"), self.optimizer == "asam"
        rules = {
            "optimizer": (self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            "steps": (whole(self.steps, 1), "an integer >= 1"),
            "rho": (self.rho >= 0 if is_sam else self.rho == 0, ">= 0, and 0 for adamw"),
            "eta": (self.eta >= 0 if is_asam else self.eta == 0, ">= 0, and 0 unless the optimizer is asam"),
            "lr": (self.lr > 0, "> 0"),
            "weight_decay": (self.weight_decay >= 0, ">= 0"),
            "warmup": (0 <= self.warmup < 1, "in [0, 1)"),
            "batch_size": (whole(self.batch_size, 1), "an integer >= 1"),
            "clip_norm": (self.clip_norm is None or self.clip_norm > 0, "> 0 or None"),
            "n_train": (self.n_train is None or whole(self.n_train, 1), "an integer >= 1 or None"),
            "seed": (whole(self.seed, 0), "an integer >= 0"),
            "precision": (self.precision in ("fp32", "bf16"), "fp32 or bf16"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise ValueError(f"{name} must be {allowed}, not {getattr(self, name)!r}")


def whole(value: object, least: int) -> bool:
    """Whether value is an integer (no bool) of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
