"""One run of a notebook: presets, strict parameters, cached results, published values, provenance."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from samlib.model import registry, weights  # what loads torch is imported where it is needed: mistakes are told at once
from samlib.notebook.parameters import check, chosen, declared, needs
from samlib.notebook.presets import Preset
from samlib.store import keys
from samlib.store.files import cache_folder, read_json, write_json
from samlib.train.device import _fast_bf16, find_device

if TYPE_CHECKING:
    from samlib.model.clip import Clip

CHECKOUT = Path(__file__).parents[2] / "book" / "published"
PUBLISHED = CHECKOUT if CHECKOUT.is_dir() else Path(__file__).parents[1] / "published"  # a copy, where it is installed


@dataclass(frozen=True)
class Run:
    """What `begin` returns.

    Args:
        notebook: its name without the ending.
        preset: the preset with the parameters that override it; its seeds are shifted by `seed`.
        parameters: as the notebook passed them.
        seed: base seed.
        device: "cpu" or "cuda" or "cuda:N".
        cache: folder of everything stored between runs.
        published: folder of the published values.
        models: pre-trained models that are loaded, by name; `clip` fills it.
    """

    notebook: str
    preset: Preset
    parameters: dict[str, Any]
    seed: int
    device: str
    cache: Path
    published: Path = PUBLISHED
    models: dict[str, Clip] = field(default_factory=dict, repr=False, compare=False)
    started: float = field(default_factory=time.monotonic, repr=False)

    @property
    def clip(self) -> Clip:
        """The pre-trained model of the preset on the run's device, loaded when it is first asked for."""
        from samlib.model.clip import load_clip

        if self.preset.model not in self.models:
            self.models[self.preset.model] = load_clip(self.device, self.preset.model)
        return self.models[self.preset.model]

    def cached(self, name: str, params: dict[str, Any], fn: Callable[[], Any]) -> Any:
        """Compute a JSON-able value once.

        Args:
            name: readable part of the file's name.
            params: JSON-able; with the preset's tasks, the model, samlib's code and fn's own code it must
                decide the value.
            fn: computes the value.

        Returns:
            The value as JSON gives it back: tuples become lists, keys become strings.

        Raises:
            ValueError: the stored file is damaged, or a number is not finite.
        """
        from samlib.data import tasks

        size = registry.image_size(self.preset.model)
        decides = {
            "params": params,
            "tasks": {task: tasks.fingerprint(task, size) for task in self.preset.tasks},
            "model": registry.identity(self.preset.model),
            "code": keys.code_of(fn),
        }
        path = self.cache / "results" / f"{name}-{keys.key(decides)}.json"
        if not path.exists():
            write_json(path, fn())
        return read_json(path)

    @property
    def published_file(self) -> Path:
        """Where this notebook's published values of this preset are."""
        return self.published / f"{self.notebook}.{self.preset.name}.json"

    def publish(self, values: Any) -> None:
        """Write the published values of this notebook and preset, with the stamp of this run.

        Args:
            values: JSON-able.

        Raises:
            ValueError: a number is not finite.
        """
        write_json(self.published_file, {"values": values, "stamp": self.stamp()})

    def published_values(self, name: str = "central.published") -> Any:
        """What `publish` wrote under a name, or None: the book's values, whatever preset this run has.

        Args:
            name: notebook and preset of the run that published, with a dot between.

        Raises:
            ValueError: the file is damaged.
        """
        return self._published(name).get("values")

    def published_stamp(self, name: str) -> dict[str, Any] | None:
        """Where the published values of a name come from, as `stamp` told it then, or None."""
        return self._published(name).get("stamp")

    def _published(self, name: str) -> dict[str, Any]:
        path = self.published / f"{name}.json"
        return read_json(path) if path.exists() else {}

    def stamp(self) -> dict[str, Any]:
        """Where the numbers come from: code, parameters, versions, device, time."""
        from samlib.store import provenance

        return {
            "notebook": self.notebook,
            "preset": self.preset.name,
            "parameters": self.parameters,
            "seeds": list(self.preset.seeds),
            "device": provenance.device(self.device),
            "model": self.preset.model,
            "precision": self.preset.precision,
            "seconds": round(time.monotonic() - self.started, 1),
            **provenance.software(),
        }


def begin(notebook: str, namespace: Mapping[str, Any]) -> Run:
    """Check a notebook's parameters, seed the generators and choose the device.

    Args:
        notebook: its name without the ending.
        namespace: globals() of a notebook, whose parameters are the names that it annotates; or a plain dictionary of
            parameters. A name that papermill injected and that is not among them is refused.

    Returns:
        The run, with the preset's fields overridden by parameters of the same name that are not None.

    Raises:
        ValueError: an unknown name, a value of the wrong type or out of range, or a device that is absent.
        ConnectionError: the model or a task would have to come from the hub, and the hub cannot be reached.
        MemoryError: not one image of the preset's model could be trained in the memory that is free.

    Taught in: every notebook, first code cell.
    """
    parameters = declared(namespace)
    check(notebook, parameters)
    weights.need(*needs(parameters))
    return start(notebook, parameters)


def start(notebook: str, parameters: dict[str, Any]) -> Run:
    """What `begin` does when all is checked and at hand.

    Args:
        notebook, parameters: as for `begin`.

    Raises:
        ValueError: the device is absent.
        MemoryError: as `begin`.
    """
    import torch

    from samlib.train import budget

    preset, seed = chosen(parameters), parameters.get("seed", 0)
    device = find_device(parameters.get("device", "auto"))
    if preset.precision == "auto":
        half = "fp16" if device.startswith("cuda") else "fp32"  # fp16 on the CPU is slower than fp32
        preset = dataclasses.replace(preset, precision="bf16" if _fast_bf16(device) else half)
    if preset.micro_batch == "auto":
        fitting = budget.micro_batch(preset.model, preset.batch_size, device, preset.precision)
        preset = dataclasses.replace(preset, micro_batch=fitting)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (the global generator, for libraries that use it)
    torch.manual_seed(seed)
    cache = cache_folder()
    return Run(notebook, preset, dict(parameters), seed, device, cache)
