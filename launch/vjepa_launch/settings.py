"""Where a run happens: a profile per cluster. Not part of the run, and never imports torch."""

from pydantic import BaseModel, ConfigDict


class BadInput(ValueError):
    """Something a user can fix: what is wrong, what we got, what to do. The command line exits with 2."""


class Settings(BaseModel):
    """A frozen group of settings that refuses what it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
