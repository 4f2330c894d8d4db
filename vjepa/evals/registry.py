"""The evaluations that `vjepa eval NAME MODEL SHARDS` runs. Never imports torch.

An evaluation is a module with a settings class and `evaluate(model, data, settings, context) -> Result`, see
`vjepa.evals.base`. Its entry in this table makes it a command. Other packages add their evaluations with

    EVALUATIONS["mine"] = EvaluationEntry("my_module", "MySettings", "a line of help")
"""

import difflib
from dataclasses import dataclass

from vjepa_data.errors import BadInput


@dataclass(frozen=True)
class EvaluationEntry:
    """The module and the settings class of an evaluation."""

    module: str
    """Importable name of the module that defines `evaluate`."""
    settings: str
    """Name of the settings class in that module."""
    summary: str
    """A line of help."""
    title: str = ""
    """Heading of its results on pages. The default is the name of the evaluation."""


EVALUATIONS: dict[str, EvaluationEntry] = {
    "probe": EvaluationEntry(
        "vjepa.evals.linear",
        "ProbeSettings",
        "linear probes, compared with an untrained encoder, pixels and the prior",
        "Linear probes",
    ),
    "attentive": EvaluationEntry(
        "vjepa.evals.attentive",
        "AttentiveSettings",
        "V-JEPA 2's attentive probe over a grid of learning rates, selected on separate videos",
        "Attentive probe",
    ),
    "dense": EvaluationEntry(
        "vjepa.evals.dense.evaluation",
        "DenseSettings",
        "linear probes of each token for maps of objects, depth or movement",
        "Dense probes",
    ),
    "memory": EvaluationEntry(
        "vjepa.evals.memory.evaluation",
        "MemoryEvalSettings",
        "recall against delay behind a curtain, compared with memories that need no training",
        "Recall against delay",
    ),
    "knn": EvaluationEntry("vjepa.evals.knn", "KnnSettings", "a vote of nearest neighbours", "Nearest neighbours"),
    "surprise": EvaluationEntry(
        "vjepa.evals.surprise.evaluation",
        "SurpriseSettings",
        "violation of expectation, on generated films, IntPhys, GRASP, InfLevel or IntPhys 2",
        "Violation of expectation",
    ),
    "agency": EvaluationEntry(
        "vjepa.evals.agency",
        "AgencySettings",
        "surprise of a model with actions, if the same film has its actions permuted",
        "Agency",
    ),
}


def find_evaluation(name: str) -> EvaluationEntry:
    """Return the entry of an evaluation.

    Raises:
        BadInput: the name is unknown.
    """
    if name not in EVALUATIONS:
        near = difflib.get_close_matches(name, EVALUATIONS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(EVALUATIONS)}"
        raise BadInput(f"unknown evaluation {name!r}; {hint}")
    return EVALUATIONS[name]


def title_of(name: str) -> str:
    """Return the heading for results of an evaluation, which may be unknown here."""
    entry = EVALUATIONS.get(name)
    return (entry.title if entry else "") or name
