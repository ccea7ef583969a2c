"""Pre-trained weights from the Hugging Face hub, and what of a run would have to come from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from samlib.data import catalogue, hub
from samlib.data.catalogue import task_folder
from samlib.model import registry
from samlib.store.files import cache_folder, images_folder

WEIGHTS = "open_clip_model.safetensors"  # open_clip's file of weights; its pickled twin is not read


def need(model: str, tasks: Sequence[str] = ()) -> None:
    """Refuse at once what would have to be downloaded while the hub does not answer; nothing is downloaded.

    Args:
        model: as `clip.load_clip` knows it.
        tasks: names that `tasks.load_task` knows.

    Raises:
        KeyError: no such task.
        ValueError: no such model, or nothing can be stored here.
        ConnectionError: something is neither here nor to be had; the message lists all of it.
    """
    registry.check(model)
    cache_folder(), images_folder()
    size = registry.image_size(model)
    missing = [task for task in tasks if not task_folder(task) and not catalogue.decoded(task, size).is_dir()]
    if constants.HF_HUB_OFFLINE:
        missing = [task for task in missing if not hub.in_caches(task)]
    if missing or not _weights_here(model):
        hub.ask(
            lambda: huggingface_hub.get_session().head(constants.ENDPOINT, timeout=hub.SECONDS),
            _missing(model, missing),
        )


def weights(model: str) -> Path:
    """The file of a pre-trained open_clip model, downloaded or from the hub's own cache.

    Args:
        model: as `clip.load_clip` knows it, with a tag, such as "ViT-B-32/openai".

    Returns:
        A safetensors file.

    Raises:
        ConnectionError: the hub does not answer.
    """
    if found := _cached(model):
        return found
    repository = _repository(model)
    url = huggingface_hub.hf_hub_url(repository, WEIGHTS)
    hub.ask(lambda: huggingface_hub.get_hf_file_metadata(url, timeout=hub.SECONDS), _missing(model))
    try:
        return Path(huggingface_hub.hf_hub_download(repository, WEIGHTS))
    except (OSError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise hub.unreachable(error, _missing(model)) from None


def _missing(model: str, tasks: Sequence[str] = ()) -> hub.Missing:
    """A model's weights, if they are not here, and the tasks that are not."""
    missing = hub.missing(tasks, model)
    if _weights_here(model):
        return missing
    name, tag, _ = registry.parts(model)
    wanted = f"the weights {tag!r} of {name}, {WEIGHTS} in {_repository(model)}"
    remedy = f"name the weights' file: {model}@/absolute/path/{WEIGHTS}"
    return replace(missing, wanted=(wanted, *missing.wanted), remedies=(*missing.remedies, remedy))


def _repository(model: str) -> str:
    """Where open_clip says that a model's weights are on the hub, "owner/name"."""
    return str(registry.released(model)["hf_hub"]).rstrip("/")


def _cached(model: str) -> Path | None:
    """A model's weights in the hub's own cache."""
    found = huggingface_hub.try_to_load_from_cache(_repository(model), WEIGHTS)
    return Path(found) if isinstance(found, str) else None


def _weights_here(model: str) -> bool:
    """Whether a model's weights are embedded, in a file that its name gives, random, or in the hub's own cache."""
    _, tag, file = registry.parts(model)
    return model == registry.TESTBED or tag == registry.RANDOM or bool(file or _cached(model))
