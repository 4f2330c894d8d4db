"""The settings that every method has, and the registry that finds a method by its name. Never imports torch.

A method is a folder with two files: `settings.py`, which loads without torch, and `method.py`, in the order of the
paper. A line of `METHODS` makes it known to the settings of a run, the trainer, the estimate and the pages.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from vjepa.methods.mask_settings import Mask
from vjepa.nn.settings import Model
from vjepa_data.settings import Data, Settings


@runtime_checkable
class RunSettings(Protocol):
    """The part of a run's settings that a method may read."""

    @property
    def seed(self) -> int: ...

    @property
    def batch_size(self) -> int:
        """Clips per step over all ranks."""
        ...

    @property
    def data(self) -> Data: ...

    @property
    def model(self) -> Model: ...

    @property
    def precision(self) -> str: ...

    @property
    def accumulate(self) -> int:
        """Micro-batches per step on each rank."""
        ...


class MethodSettings(Settings):
    """Base of the settings of a method."""

    name: Any
    """Name under which the method is registered, as a `Literal` in each subclass."""

    def with_absolute_paths(self) -> "MethodSettings":
        """Return the same settings with absolute paths, which mean the same in every working folder."""
        return self

    @property
    def mask_kinds(self) -> tuple[Mask, ...]:
        """Kinds of mask through which every clip is seen. Empty for a method that does not mask."""
        return ()

    def check(self, run: RunSettings) -> None:
        """Reject combinations with other settings of the run that the method cannot train.

        Raises:
            ValueError: settings that do not fit, with their remedy.
        """


def check_window(run: RunSettings) -> None:
    """Reject a window of attention in an encoder that looks both ways.

    Raises:
        ValueError: see above.
    """
    if run.model.window is not None and not run.model.causal:
        raise ValueError(
            f"model.window ({run.model.window}) limits attention to earlier tubelets; set model.causal or remove it"
        )


@dataclass(frozen=True)
class MethodEntry:
    """Modules that define the settings and the networks of a method."""

    settings: str | type[MethodSettings]
    """The settings class, or its place as `module:class`."""

    method: str | type
    """The method class, or its place as `module:class`, which is imported when a run is built, since it needs torch."""


METHODS: dict[str, MethodEntry] = {
    "vjepa2": MethodEntry("vjepa.methods.vjepa2.settings:VJEPA2Settings", "vjepa.methods.vjepa2.method:VJEPA2"),
    "vjepa2_1": MethodEntry("vjepa.methods.vjepa2_1.settings:VJEPA21Settings", "vjepa.methods.vjepa2_1.method:VJEPA21"),
    "levjepa": MethodEntry("vjepa.methods.levjepa.settings:LeVJEPASettings", "vjepa.methods.levjepa.method:LeVJEPA"),
    "dynamics": MethodEntry(
        "vjepa.methods.dynamics.settings:DynamicsSettings", "vjepa.methods.dynamics.method:Dynamics"
    ),
    "memory": MethodEntry("vjepa.methods.memory.settings:MemorySettings", "vjepa.methods.memory.method:Memory"),
    "lewm": MethodEntry("vjepa.methods.lewm.settings:LeWMSettings", "vjepa.methods.lewm.method:LeWM"),
}
"""All methods by name. A program may add its own entry before it loads a run."""

DEFAULT_METHOD = "vjepa2"


def import_class(place: str | type) -> type:
    """Return a class, importing it if it is given as `module:class`."""
    if isinstance(place, type):
        return place
    import importlib

    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def settings_classes() -> Iterator[type[MethodSettings]]:
    """Yield the settings class of every registered method."""
    for entry in METHODS.values():
        yield import_class(entry.settings)


def read_method_settings(given: Any) -> Any:
    """Validate a mapping with the settings class of the method that it names. Pass anything else through.

    Raises:
        ValueError: the name is not registered, or a setting does not fit.
    """
    if not isinstance(given, dict):
        return given
    name = given.get("name", DEFAULT_METHOD)
    if name not in METHODS:
        near = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f". Did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown method {name!r}; choose from {', '.join(METHODS)}{hint}")
    return import_class(METHODS[name].settings).model_validate({**given, "name": name})
