"""Errors of the data room: invalid input, and unreadable samples. Imports nothing."""


class BadInput(ValueError):
    """An error that the user can fix (exit code 2). The message names the fault, the given value and the remedy."""


REASONS: tuple[str, ...] = (
    "missing",
    "size",
    "hash",
    "error",
    "frames",
    "timeout",
    "crash",
    "memory",
    "signal",
    "text",
    "known",
)
"""Why a sample is unreadable, in words for statistics."""


class Unreadable(Exception):
    """A sample that cannot be read or decoded. The stream replaces it.

    Attributes:
        reason: a word for statistics: "missing", "size" or "hash" (of the shard or its bytes), "error" (from the
            decoder), "frames" (the video differs from its index entry), "timeout", "crash", "memory".
        detail: a line for a reader.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"
