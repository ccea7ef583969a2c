"""What comes from the hub, datasets and weights, with one clear error where it cannot be reached."""

from __future__ import annotations

import errno
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
        ConnectionError: something is neither here nor to be had.
    """
    missing = [_about_weights(model)] if _weights_missing(model) else []
    size = catalogue.image_size(model)
    for task in tasks:  # where HF_HUB_OFFLINE is set, the hub's own cache may have them
        if not catalogue.folder(task) and not catalogue.decoded(task, size).is_dir() and not constants.HF_HUB_OFFLINE:
            missing.append(_about_dataset(task))
    if missing:
        _ask(lambda: huggingface_hub.get_session().head(constants.ENDPOINT, timeout=SECONDS), *missing[0])


def dataset(name: str) -> tuple[datasets.DatasetDict, str | None]:
    """A dataset of the table, downloaded; or, where HF_HUB_OFFLINE is set, from the hub's own cache.

    Args:
        name: key in HUB.

    Returns:
        Its splits with columns `image` and `label`, and the commit they are from, None where nobody could be asked.

    Raises:
        ConnectionError: the hub does not answer.

    Taught in: 03_models_and_tasks.
    """
    import datasets

    row, (wanted, remedy) = HUB[name], _about_dataset(name)

    def commit() -> str:
        info = huggingface_hub.HfApi().dataset_info(row.id, revision=row.revision, timeout=SECONDS)
        return str(info.sha)

    offline = bool(constants.HF_HUB_OFFLINE)  # then the hub's own cache may have it
    revision = row.revision if offline else _ask(commit, wanted, remedy)
    try:
        return datasets.load_dataset(row.id, row.config, revision=revision), revision
    except (OSError, ValueError) as error:
        raise _unreachable(wanted, error, remedy) from None


def weights(model: str, tag: str, repository: str) -> Path:
    """The file of a pre-trained open_clip model, downloaded or from the hub's own cache.

    Args:
        model: open_clip's name of the architecture, such as "ViT-B-32".
        tag: open_clip's name of the weights, such as "openai".
        repository: where open_clip says that they are on the hub, "owner/name" or "".

    Returns:
        A safetensors file.

    Raises:
        ValueError: they are not on the hub.
        ConnectionError: the hub does not answer.
    """
    repository = repository.rstrip("/")
    if repository.count("/") != 1:
        raise ValueError(f"the weights {tag!r} of {model} are not on the hub as safetensors: choose other ones")
    found = huggingface_hub.try_to_load_from_cache(repository, WEIGHTS)
    if isinstance(found, str):
        return Path(found)
    wanted, remedy = _about_weights(f"{model}/{tag}")
    url = huggingface_hub.hf_hub_url(repository, WEIGHTS)
    _ask(lambda: huggingface_hub.get_hf_file_metadata(url, timeout=SECONDS), wanted, remedy)
    try:
        return Path(huggingface_hub.hf_hub_download(repository, WEIGHTS))
    except (OSError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise _unreachable(wanted, error, remedy) from None


def _weights_missing(model: str) -> bool:
    """Whether a model's weights can only come from the hub: no file, and not one such file in the hub's own cache."""
    _, tag, file = catalogue.parts(model)
    if model == catalogue.TESTBED or tag == catalogue.RANDOM or file:
        return False
    return not any(Path(constants.HF_HUB_CACHE).glob(f"models--*/snapshots/*/{WEIGHTS}"))


def _about_weights(model: str) -> tuple[str, str]:
    """What a model needs from the hub, and what to do without it."""
    name, tag, _ = catalogue.parts(model)
    return f"the weights {tag!r} of {name} are on the Hugging Face hub", (
        f"With a network, run once: python -m samlib.fetch --model {model}; "
        f"or name a file: {model}@/absolute/path/{WEIGHTS}"
    )


def _about_dataset(task: str) -> tuple[str, str]:
    """What a task needs from the hub, and what to do without it."""
    return f"task {task!r} is the dataset {HUB[task].id} of the Hugging Face hub", (
        f"With a network, run once: python -m samlib.fetch {task} --model MODEL, for the model that will read it "
        f"(it fills {store.images_folder()}); if the hub's own cache has it, set HF_HUB_OFFLINE=1; "
        f"or let SAMLIB_DATA name a folder that holds {task}/train-*.parquet and {task}/test-*.parquet "
        f"with the columns image and label"
    )


def _ask(question: Callable[[], Answer], wanted: str, remedy: str) -> Answer:
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
        raise _unreachable(wanted, answer, remedy)
    return answer


def _unreachable(wanted: str, error: Exception, remedy: str) -> Exception:
    """What to raise: the one helpful error, but a full disk is told as what it is."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return error
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return ConnectionError(f"{wanted}, which cannot be had here ({reason}). {remedy}")
