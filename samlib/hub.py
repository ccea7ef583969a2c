"""What comes from the hub, datasets and weights, with one clear error where it cannot be reached."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import datasets
import huggingface_hub
from huggingface_hub import constants

from samlib import cache as store
from samlib.hub_table import HUB

SECONDS = 3.0  # to wait for the hub's first answer
WEIGHTS = "open_clip_model.safetensors"  # open_clip's file of weights; its pickled twin is not read
Answer = TypeVar("Answer")


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
    row = HUB[name]
    remedy = (
        f"With a network, run once: python -m samlib.tasks {name} --size SIDE (it fills {store.images_folder()}); "
        f"if the hub's own cache has it, set HF_HUB_OFFLINE=1; "
        f"or let SAMLIB_DATA name a folder that holds {name}/train-*.parquet and {name}/test-*.parquet "
        f"with the columns image and label"
    )

    def commit() -> str:
        info = huggingface_hub.HfApi().dataset_info(row.id, revision=row.revision, timeout=SECONDS)
        return str(info.sha)

    wanted = f"task {name!r} is the dataset {row.id} of the Hugging Face hub"
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
    wanted = f"the weights {tag!r} of {model} are {WEIGHTS} in {repository} on the Hugging Face hub"
    remedy = (
        f"With a network, run once: python -m samlib.clip {model}/{tag}; or name a file: "
        f"{model}/{tag}@/absolute/path/{WEIGHTS}"
    )
    url = huggingface_hub.hf_hub_url(repository, WEIGHTS)
    _ask(lambda: huggingface_hub.get_hf_file_metadata(url, timeout=SECONDS), wanted, remedy)
    try:
        return Path(huggingface_hub.hf_hub_download(repository, WEIGHTS))
    except (OSError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise _unreachable(wanted, error, remedy) from None


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
