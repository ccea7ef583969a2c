"""The paper's eight tasks: where they are on the Hugging Face hub and what the prompts say."""

from __future__ import annotations

from dataclasses import dataclass

CORRUPTIONS = (
    "contrast",
    "gaussian_noise",
    "impulse_noise",
    "jpeg_compression",
    "motion_blur",
    "pixelate",
    "spatter",
)


@dataclass(frozen=True)
class HubTask:
    """One row of the table.

    Args:
        id: of the dataset on the hub, with columns `image` and `label`.
        templates: CLIP's zero-shot prompts for it, with one {} for the class.
        config: of the dataset, where it has several.
        revision: commit to fetch, None for the newest; what was fetched is recorded with the images.
        corruptions: splits with damaged test images.

    Taught in: 03_models_and_tasks.
    """

    id: str
    templates: tuple[str, ...]
    config: str | None = None
    revision: str | None = None
    corruptions: tuple[str, ...] = ()


def _two(before: str) -> tuple[str, str]:
    return f"{before} a {{}}.", f"{before} the {{}}."


_VIEWS = tuple(f"{kind} {what} of" for what in ("imagery", "photo", "view") for kind in ("satellite", "aerial"))


# Templates: Radford et al. 2021, the prompts published with CLIP
HUB: dict[str, HubTask] = {
    "sun397": HubTask("tanganke/sun397", _two("a photo of")),
    "stanford_cars": HubTask(
        "tanganke/stanford_cars",
        (
            *_two("a photo of"),
            "a photo of my {}.",
            "i love my {}!",
            *(f"a photo of my {state} {{}}." for state in ("dirty", "clean", "new", "old")),
        ),
        corruptions=CORRUPTIONS,
    ),
    "resisc45": HubTask(
        "tanganke/resisc45",
        tuple(f"{view}{article} {{}}." for article in ("", " a", " the") for view in _VIEWS),
        corruptions=CORRUPTIONS,
    ),
    "eurosat": HubTask(
        "tanganke/eurosat", ("a centered satellite photo of {}.", *_two("a centered satellite photo of"))
    ),
    "svhn": HubTask("ufldl-stanford/svhn", ('a photo of the number: "{}".',), config="cropped_digits"),
    "gtsrb": HubTask(
        "tanganke/gtsrb",
        tuple(f'a {view} photo of a "{{}}" traffic sign.' for view in ("zoomed in", "centered", "close up")),
        corruptions=CORRUPTIONS,
    ),
    "mnist": HubTask("ylecun/mnist", ('a photo of the number: "{}".',)),
    "dtd": HubTask(
        "tanganke/dtd",
        tuple(
            f"a photo of {article} {{}} {what}."
            for article in ("a", "the")
            for what in ("texture", "pattern", "thing", "object")
        ),
    ),
}
