"""Settings that may and may not change between two attempts of a run."""

from collections.abc import Callable

import pytest

from vjepa.config import Run
from vjepa.engine.resume import check_changes
from vjepa_data.settings import BadInput

MakeRun = Callable[..., Run]


def changes(then: Run, now: Run, *, step: int = 10, manifests: tuple[str, str] = ("a", "a")) -> dict[str, list[object]]:
    return check_changes(
        then.model_dump(mode="json"), now, step=step, manifests=[manifests[1]], manifests_then=[manifests[0]]
    )


def test_only_changes_that_keep_past_steps_valid_are_accepted(tiny_run: MakeRun) -> None:
    old = tiny_run(steps=100)
    assert changes(old, old) == {}
    assert changes(old, tiny_run(steps=100, loader={"workers": 4}, parallel={"accumulate": 2})) == {
        "loader.workers": [0, 4],
        "parallel.accumulate": [1, 2],
    }
    moved = tiny_run(steps=100, data={"sources": [{"shards": "/elsewhere"}]})
    assert list(changes(old, moved)) == ["data.sources.0.shards"]
    with pytest.raises(BadInput, match="the corpora changed since step 10"):
        changes(old, moved, manifests=("a", "b"))
    assert changes(old, tiny_run(steps=200)) == {"steps": [100, 200]}
    warm = tiny_run(steps=100, optim={"warmup_steps": 5})
    assert changes(warm, tiny_run(steps=100, optim={"warmup_steps": 5, "start_lr": 0.0, "final_lr": 0.1}))
    blocks = {"mode": "balanced", "block_share": 0.15}
    for name, change in (
        ("seed", {"seed": 1}),
        ("precision", {"precision": "bf16"}),
        ("optim.lr", {"optim": {"lr": 1.0}}),
        ("optim.decay", {"optim": {"decay": "cosine"}}),
        ("data.crop.px", {"data": {"crop": {"px": 16}}}),
        ("objective.masks.0.blocks", {"objective": {"masks": [{**blocks, "blocks": 5}, old.objective.mask_kinds[1]]}}),
    ):
        with pytest.raises(BadInput, match=rf"^{name} was .* when step 10 was saved"):
            changes(old, tiny_run(**{"steps": 100, **change}))
