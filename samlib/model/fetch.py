"""Everything that a run needs from elsewhere, fetched and decoded beforehand, so that the run needs no network."""

from __future__ import annotations

import argparse

from samlib.model import registry, weights  # what loads torch is imported where it is needed: mistakes are told at once


def main() -> None:
    """Fetch a model, and tasks as large as it reads them: `python -m samlib.model.fetch dtd --model ViT-B-32/openai`.

    Taught in: 03_models_and_tasks.
    """
    parser = argparse.ArgumentParser(prog="python -m samlib.model.fetch", description=main.__doc__)
    parser.add_argument("tasks", nargs="*", help="such as mnist and dtd, or folders in SAMLIB_DATA")
    parser.add_argument("--model", default=registry.TESTBED, help="testbed, or such as ViT-B-32/openai")
    a = parser.parse_args()
    try:
        weights.need(a.model, a.tasks)
        _fetch(a.model, a.tasks)
    except (KeyError, ValueError, ConnectionError) as error:
        parser.error(error.args[0])


def _fetch(model: str, names: list[str]) -> None:
    """Load all of it once, and report what it holds."""
    from samlib.data import decode
    from samlib.data.tasks import load_task
    from samlib.model.clip import load_clip

    found = load_clip(model=model)
    parameters = sum(p.numel() for p in found.encoder.parameters())
    print(f"{model}: {parameters / 1e6:.1f} million parameters in the image encoder, reads {found.size} pixels")
    for name in names:
        task = load_task(name, found.size)
        exact, near = decode.overlap([task.train.images, task.validation.images], task.test.images)
        side, revision = task.train.images.shape[-1], f", revision {task.revision}" if task.revision else ""
        print(
            f"{name}: {len(task.classes)} classes, {len(task.train)} + {len(task.validation)} training and validation, "
            f"{len(task.test)} test images of {side} x {side} pixels{revision}; "
            f"of the test images {exact} are among the others, {near} nearly"
        )


if __name__ == "__main__":
    main()
