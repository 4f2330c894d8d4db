"""Planning with a world model: planners, worlds, and an evaluation in closed loop."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vjepa.planning.policy import Policy as Policy

__all__ = ["Policy"]


def __getattr__(name: str) -> Any:
    if name == "Policy":  # imported late, since it needs torch
        from vjepa.planning.policy import Policy

        return Policy
    raise AttributeError(f"module 'vjepa.planning' has no attribute {name!r}")
