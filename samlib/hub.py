"""What comes from the hub, datasets and weights, with one clear error where it cannot be reached."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import huggingface_hub
from huggingface_hub import constants

from samlib import cache as store
from samlib import catalogue
from samlib.hub_table import HUB

if TYPE_CHECKING:  # seconds to import, and a missing network is told at once
    import datasets

SECONDS = 3.0  # to wait for the hub's first answer
WEIGHTS = "open_clip_model.safetensors"  # open_clip's file of weights; its pickled twin is not read
Answer = TypeVar("Answer")


def need(model: str, tasks: Sequence[str] = ()) -> None:
    """Refuse at once what would have to be downloaded while the hub does not answer; nothing is downloaded.

    Args:
        model: as `clip.load` knows it.
        tasks: names that `tasks.load` knows.

    Raises:
        KeyError: no such task.
        ValueError: no such model.
        ConnectionError: something is neither here nor to be had; the message lists all of it.
    """
    catalogue.check(model)
    size = catalogue.image_size(model)
    missing = [task for task in tasks if not catalogue.folder(task) and not catalogue.decoded(task, size).is_dir()]
    if constants.HF_HUB_OFFLINE:
        missing = [task for task in missing if not _in_caches(task)]
    if missing or not _weights_here(model):
        _ask(lambda: huggingface_hub.get_session().head(constants.ENDPOINT, timeout=SECONDS), model, missing)


def commit(task: str) -> str | None:
    """The commit of a task's dataset that is to be fetched, or None where HF_HUB_OFFLINE is set and nobody is asked.

    Args:
        task: key in HUB.

    Raises:
        ConnectionError: the hub does not answer.
    """
    row = HUB[task]
    if constants.HF_HUB_OFFLINE:
        return row.revision
    api = huggingface_hub.HfApi()
    return _ask(lambda: str(api.dataset_info(row.id, revision=row.revision, timeout=SECONDS).sha), None, [task])


def dataset(task: str, revision: str | None) -> datasets.DatasetDict:
    """A dataset of the table, downloaded; or, where HF_HUB_OFFLINE is set, from the hub's own cache.

    Args:
        task: key in HUB.
        revision: as `commit` tells it.

    Returns:
        Its splits with columns `image` and `label`.

    Raises:
        ConnectionError: the hub does not answer.

    Taught in: 03_models_and_tasks.
    """
    import datasets

    try:
        return datasets.load_dataset(HUB[task].id, HUB[task].config, revision=revision)
    except (OSError, ValueError) as error:
        raise _unreachable(error, None, [task]) from None


def weights(model: str) -> Path:
    """The file of a pre-trained open_clip model, downloaded or from the hub's own cache.

    Args:
        model: as `clip.load` knows it, with a tag, such as "ViT-B-32/openai".

    Returns:
        A safetensors file.

    Raises:
        ConnectionError: the hub does not answer.
    """
    if found := _cached(model):
        return found
    repository = _repository(model)
    url = huggingface_hub.hf_hub_url(repository, WEIGHTS)
    _ask(lambda: huggingface_hub.get_hf_file_metadata(url, timeout=SECONDS), model, [])
    try:
        return Path(huggingface_hub.hf_hub_download(repository, WEIGHTS))
    except (OSError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise _unreachable(error, model, []) from None


def _repository(model: str) -> str:
    """Where open_clip says that a model's weights are on the hub, "owner/name"."""
    return str(catalogue.released(model)["hf_hub"]).rstrip("/")


def _cached(model: str) -> Path | None:
    """A model's weights in the hub's own cache."""
    found = huggingface_hub.try_to_load_from_cache(_repository(model), WEIGHTS)
    return Path(found) if isinstance(found, str) else None


def _weights_here(model: str) -> bool:
    """Whether a model's weights are embedded, in a file that its name gives, random, or in the hub's own cache."""
    _, tag, file = catalogue.parts(model)
    return model == catalogue.TESTBED or tag == catalogue.RANDOM or bool(file or _cached(model))


def _in_caches(task: str) -> bool:
    """Whether the hub's own caches have something of a task's dataset."""
    caches = Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME) / "datasets"))
    owner, name = HUB[task].id.split("/")
    return any(
        folder.is_dir()
        for folder in (Path(constants.HF_HUB_CACHE) / f"datasets--{owner}--{name}", caches / f"{owner}___{name}")
    )


def _ask(question: Callable[[], Answer], model: str | None, tasks: Sequence[str]) -> Answer:
    """One try, in a thread of its own: a resolver without a network may outlast every timeout of the library."""
    answers: list[Any] = []

    def attempt() -> None:
        try:
            answers.append(question())
        except Exception as error:  # handed on below
            answers.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(SECONDS + 0.5)
    answer = answers[0] if answers else TimeoutError(f"no answer in {SECONDS:.0f} s")
    if isinstance(answer, Exception):
        raise _unreachable(answer, model, tasks)
    return answer


def _unreachable(error: Exception, model: str | None, tasks: Sequence[str]) -> Exception:
    """What to raise: the one helpful error, but a full disk is told as what it is.

    Args:
        error: what went wrong.
        model: that will read the tasks, and may itself be missing; None if it is not known here.
        tasks: that are missing.
    """
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return error
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    wanted = [f"task {task!r}, the dataset {HUB[task].id}" for task in tasks]
    remedies = []
    if tasks and not constants.HF_HUB_OFFLINE:
        remedies.append("if the hub's own cache has the datasets, set HF_HUB_OFFLINE=1")
    if tasks:
        layout = "<task>/train-*.parquet and <task>/test-*.parquet (image, label)"
        remedies.append(f"let SAMLIB_DATA name a folder with {layout}")
    if model and not _weights_here(model):
        name, tag, _ = catalogue.parts(model)
        wanted.insert(0, f"the weights {tag!r} of {name}, {WEIGHTS} in {_repository(model)}")
        remedies.append(f"name the weights' file: {model}@/absolute/path/{WEIGHTS}")
    fetch = " ".join(["python -m samlib.fetch", *tasks, "--model", model or "MODEL"])
    filled = f" (it fills {store.images_folder()})" if tasks else ""
    return ConnectionError(
        f"This needs {'; '.join(wanted)}. That is on the Hugging Face hub, which cannot be had here ({reason}). "
        f"With a network, run once: {fetch}{filled}; or {'; or '.join(remedies)}"
    )
