"""What is compared: the arms, and the recipes they stand for."""

from __future__ import annotations

from dataclasses import dataclass

from samlib.notebook.run import Run
from samlib.train.recipe import Recipe

_NAMES = {"adamw": "AdamW", "sam": "SAM", "asam": "ASAM"}


@dataclass(frozen=True)
class Arm:
    """A way of fine-tuning that is compared with others.

    Args:
        optimizer: adamw, sam or asam.
        rho: radius, >= 0; None for the preset's, and always None for adamw.
        times: multiple of the preset's steps. SAM and ASAM take two gradients a step: AdamW with twice the steps costs
            what they do.
        joint: True trains one model on all tasks, which is what merging would like to reach, with as many updates as
            all single models together.

    Raises:
        ValueError: no such optimiser, or a radius for adamw.

    Taught in: 04_fine_tuning.
    """

    optimizer: str
    rho: float | None = None
    times: int = 1
    joint: bool = False

    def __post_init__(self) -> None:
        if self.optimizer not in _NAMES:
            raise ValueError(f"optimizer must be one of {', '.join(_NAMES)}, not {self.optimizer!r}")
        if self.rho is not None and self.optimizer == "adamw":
            raise ValueError(f"adamw has no radius: rho must be None, not {self.rho!r}")

    def __str__(self) -> str:
        """Its name in tables, figures and published files."""
        parts = [_NAMES[self.optimizer]]
        parts += [f"{self.times}x steps"] * (self.times != 1) + ["all tasks"] * self.joint
        return ", ".join(parts if self.rho is None else [*parts, f"rho {self.rho:g}"])


def named(*arms: Arm) -> dict[str, Arm]:
    """Arms by their names."""
    return {str(arm): arm for arm in arms}


BASES = named(Arm("adamw"), Arm("adamw", times=2))  # at equal steps, and at equal gradient evaluations
ARMS = BASES | named(Arm("sam"), Arm("asam"))
JOINT = Arm("adamw", joint=True)


def recipes(run: Run, arm: Arm, seed: int, length: float = 1.0) -> list[Recipe]:
    """One recipe a task: what the arm trains with this seed. Of JOINT, one recipe for all tasks.

    Args:
        run: its preset gives tasks, steps, radii and learning rate.
        arm: such as one of ARMS.
        seed: of data order and augmentation; equal seeds are paired between arms.
        length: multiple of the preset's steps, > 0.

    Taught in: 04_fine_tuning.
    """
    p = run.preset
    steps = max(1, round(p.steps * length * arm.times))
    radius = {"sam": p.rho_sam, "asam": p.rho_asam}.get(arm.optimizer, 0.0)
    return [
        Recipe(
            tasks=tasks,
            optimizer=arm.optimizer,
            steps=steps * len(tasks),
            rho=radius if arm.rho is None else arm.rho,
            lr=p.lr,
            batch_size=p.batch_size,
            n_train=p.n_train,
            label_noise=p.label_noise,
            seed=seed,
            precision=p.precision,
            micro_batch=p.micro_batch if isinstance(p.micro_batch, int) else None,
            shared_climb=p.micro_batch is not None,  # then the size of the micro-batches does not change the result
        )
        for tasks in ([p.tasks] if arm.joint else [(task,) for task in p.tasks])
    ]
