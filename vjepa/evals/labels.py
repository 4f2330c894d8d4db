"""Labels of the samples of a corpus, and the reasons why some cannot be predicted.

Words, booleans and whole numbers are classes, other numbers are numbers. Whole numbers with too many values for classes
are numbers too. Null, NaN and infinite values count as missing.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vjepa.evals.ridge import Kind
from vjepa_data.corpus.index import Index
from vjepa_data.errors import Unreadable
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)

MAX_CLASSES = 1000

Value = str | bool | int | float


def scalars(labels: Mapping[str, Any]) -> dict[str, Value]:
    """Return the labels that are single words or finite numbers."""
    return {name: value for name, value in labels.items() if _is_scalar(value)}


def _is_scalar(value: object) -> bool:
    if isinstance(value, float | int):
        try:
            return math.isfinite(value)
        except OverflowError:  # an integer beyond the range of floats
            return False
    return isinstance(value, str)


@dataclass(frozen=True)
class LabelValues:
    """The values of a label, for each video that has it."""

    fit: Sequence[Value]
    report: Sequence[Value]

    def kind(self) -> Kind | str:
        """Return whether the label is a class or a number, or else the reason why it cannot be predicted."""
        if len(self.fit) < 2 or not self.report:
            place = "to report on" if len(self.fit) >= 2 else "to fit on"
            return f"{len(self.report) if len(self.fit) >= 2 else len(self.fit)} of the videos {place} have it"
        values = [*self.fit, *self.report]
        has_words = any(isinstance(value, str) for value in values)
        has_fractions = any(isinstance(value, float) for value in values)
        are_numbers = not has_words and not any(isinstance(value, bool) for value in values)
        classes, shared = set(map(str, self.fit)), _shared(map(str, self.fit))
        is_class = len(classes) <= MAX_CLASSES and 2 * shared >= len(self.fit)
        if len(classes) < 2:
            return f"all videos to fit on have the same value ({next(iter(classes))!r:.40})"
        if are_numbers and (has_fractions or not is_class):
            return "number" if len(set(self.report)) > 1 else "all videos to report on have the same number"
        if len(classes) > MAX_CLASSES:
            return f"it has {len(classes)} values in {len(self.fit)} videos to fit on, more than {MAX_CLASSES}"
        if not is_class:
            return f"only {shared} of {len(self.fit)} videos to fit on share their value with another"
        return "class"

    def unseen(self) -> Counter[str]:
        """Return the classes that only videos to report on have, and in how many."""
        return Counter(map(str, self.report)) - Counter({name: len(self.report) for name in map(str, self.fit)})


def _shared(values: Iterable[str]) -> int:
    """Return how many values are equal to another value."""
    return sum(count for count in Counter(values).values() if count > 1)


def read_labels(shards: Path, split: str) -> dict[str, dict[str, Any]]:
    """Return the labels of each sample of a split, by key. Unreadable samples are logged and left out.

    Raises:
        BadInput: the split is missing.
    """
    index = Index(shards, split)
    found = {}
    for number in range(len(index)):
        try:
            found[index.key(number)] = index.read_labels(number)
        except Unreadable as error:
            log.warning("%s is left out: %s", index.key(number), error.detail)
    return found


def read_class_labels(shards: Path, split: str, label: str) -> dict[str, str]:
    """Return the class of each sample that has a label, by key.

    Raises:
        BadInput: the split is missing, or no sample has the label as a word, a whole number or a boolean.
    """
    labels = read_labels(shards, split)
    found = {key: str(of[label]) for key, of in labels.items() if _is_class_value(of.get(label))}
    if not found:
        names = {name for of in labels.values() for name in of}
        known = ", ".join(sorted(names)) or "no labels"
        other = next((of[label] for of in labels.values() if label in of), None)
        if label in names:
            raise BadInput(
                f"{shards}: label {label!r} in split {split!r} is not a class but {type(other).__name__} "
                f"({other!s:.40}). Give another label, or predict numbers with `vjepa eval probe`."
            )
        raise BadInput(f"{shards}: no class label {label!r} in split {split!r}, which has {known}; give another label")
    if len(found) < len(labels):
        log.info("%d of %d samples of split %s have label %r", len(found), len(labels), split, label)
    return found


def _is_class_value(value: object) -> bool:
    return isinstance(value, str | bool | int)


def check_classes(where: str, label: str, values: Sequence[str]) -> None:
    """Reject a label that is different for most videos, before features are computed.

    Raises:
        BadInput: it has a single value, or most videos have a value of their own.
    """
    if len(set(values)) < 2:
        raise BadInput(
            f"{where}: all {len(values)} videos have the same {label!r} ({values[0]!r:.40}); give another --label"
        )
    if 2 * (shared := _shared(values)) < len(values):
        raise BadInput(
            f"{where}: only {shared} of {len(values)} videos share their value of {label!r} with another. Give another "
            "--label, or more videos."
        )
