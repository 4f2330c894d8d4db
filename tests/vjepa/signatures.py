"""Check calls against their signatures in tests, shapes included (jaxtyping, beartype).

An int is a float. A `Path` may be a path into an object store, which has its methods and is none: see
`vjepa.checkpoints.storage.path_of`.
"""

from pathlib import Path

from beartype import BeartypeConf, FrozenDict, beartype
from upath import UPath

hold = beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict({Path: Path | UPath})))
