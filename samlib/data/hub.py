"""Data sets from the Hugging Face hub, with one clear error where it cannot be reached."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import huggingface_hub
from huggingface_hub import constants

from samlib.data.paper_tasks import HUB
from samlib.store.files import images_folder

if TYPE_CHECKING:  # seconds to import, and a missing network is told at once
    import datasets

SECONDS = 3.0  # to wait for the hub's first answer
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Missing:
    """What would have to come from the hub, in words.

    Args:
        wanted: each thing that is not here.
        remedies: what helps without a network.
        fetch: the command that fetches all of it, and what it fills.
    """

    wanted: tuple[str, ...]
    remedies: tuple[str, ...]
    fetch: str


def missing(tasks: Sequence[str], model: str = "MODEL") -> Missing:
    """Tasks of the table that are not here.

    Args:
        tasks: keys in HUB.
        model: that will read them; MODEL where nobody knows it.
    """
    remedies = []
    if tasks and not constants.HF_HUB_OFFLINE:
        remedies.append("if the hub's own cache has the datasets, set HF_HUB_OFFLINE=1")
    if tasks:
        layout = "<task>/train-*.parquet and <task>/test-*.parquet (image, label)"
        remedies.append(f"let SAMLIB_DATA name a folder with {layout}")
    fetch = " ".join(["python -m samlib.model.fetch", *tasks, "--model", model])
    wanted = tuple(f"task {task!r}, the dataset {HUB[task].id}" for task in tasks)
    return Missing(wanted, tuple(remedies), fetch + (f" (it fills {images_folder()})" if tasks else ""))


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
    return ask(lambda: str(api.dataset_info(row.id, revision=row.revision, timeout=SECONDS).sha), missing([task]))


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
        raise unreachable(error, missing([task])) from None


def in_caches(task: str) -> bool:
    """Whether the hub's own caches have something of a task's dataset."""
    caches = Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME) / "datasets"))
    owner, name = HUB[task].id.split("/")
    return any(
        folder.is_dir()
        for folder in (Path(constants.HF_HUB_CACHE) / f"datasets--{owner}--{name}", caches / f"{owner}___{name}")
    )


def ask(question: Callable[[], Answer], missing: Missing) -> Answer:
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
        raise unreachable(answer, missing)
    return answer


def unreachable(error: Exception, missing: Missing) -> Exception:
    """What to raise: the one helpful error, but a full disk is told as what it is."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return error
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return ConnectionError(
        f"This needs {'; '.join(missing.wanted)}. "
        f"That is on the Hugging Face hub, which cannot be had here ({reason}). "
        f"With a network, run once: {missing.fetch}; or {'; or '.join(missing.remedies)}"
    )
