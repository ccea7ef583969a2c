"""What is compared: the arms, and the recipes they stand for."""

from __future__ import annotations

from samlib.notebook.run import Run
from samlib.train.recipe import Recipe

ARMS = ("AdamW", "AdamW, 2x steps", "SAM", "ASAM")
JOINT = "AdamW, all tasks"  # one model trained on all tasks: what merging would like to reach


def recipes(run: Run, arm: str, seed: int, length: float = 1.0) -> list[Recipe]:
    """One recipe a task: what the arm trains with this seed. Of JOINT, one recipe for all tasks.

    Args:
        run: its preset gives tasks, steps, radii and learning rate.
        arm: one of ARMS, or JOINT. SAM and ASAM take two gradients a step, so that "AdamW, 2x steps" costs what they
            do; "SAM, rho 0.02" has another radius than the preset's. JOINT makes as many updates as AdamW does for all
            tasks together.
        seed: of data order and augmentation; equal seeds are paired between arms.
        length: multiple of the preset's steps, > 0.

    Raises:
        ValueError: no such arm.

    Taught in: 04_fine_tuning.
    """
    base, _, radius = arm.partition(", rho ")
    if base not in (*ARMS, JOINT) or (radius and base not in ("SAM", "ASAM")):
        raise ValueError(f"arm must be one of {'; '.join((*ARMS, JOINT))} or such as 'SAM, rho 0.02', not {arm!r}")
    p = run.preset
    names = ("+".join(p.tasks),) if arm == JOINT else p.tasks
    steps = max(1, round(p.steps * length * (2 if arm == "AdamW, 2x steps" else 1)))
    optimizer = {"SAM": "sam", "ASAM": "asam"}.get(base, "adamw")
    rho = float(radius or {"SAM": p.rho_sam, "ASAM": p.rho_asam}.get(base, 0.0))
    return [
        Recipe(
            task=task,
            optimizer=optimizer,
            steps=steps * len(p.tasks) if arm == JOINT else steps,
            rho=rho,
            lr=p.lr,
            batch_size=p.batch_size,
            n_train=p.n_train,
            label_noise=p.label_noise,
            seed=seed,
            precision=p.precision,
            micro_batch=p.micro_batch if isinstance(p.micro_batch, int) else None,
            shared_climb=p.micro_batch is not None,  # then the size of the micro-batches does not change the result
        )
        for task in names
    ]
