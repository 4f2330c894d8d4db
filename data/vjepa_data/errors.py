"""Errors of the data room: invalid input, and unreadable samples. Imports nothing."""


class BadInput(ValueError):
    """An error that the user can fix. The message says what is wrong, what was given and what to do. Exit code 2."""


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
