"""What may be wrong: with what a user gave, and with one sample. Imports nothing."""


class BadInput(ValueError):
    """Something a user can fix: what is wrong, what we got, what to do. The command line exits with 2."""


class Unreadable(Exception):
    """A sample that cannot be had or decoded; the stream replaces it.

    Attributes:
        reason: one word for statistics: "missing", "size" or "hash" (of the shard or its bytes), "error" (the decoder
            gave up), "frames" (it found another video than the index tells of), "timeout", "crash", "memory".
        detail: one line for a person.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"
