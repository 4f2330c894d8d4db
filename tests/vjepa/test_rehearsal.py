"""A rehearsed start: the work of a rank at 8 and 16 pretended ranks, and whole tensors against slices."""

from collections.abc import Callable

import pytest
import torch

from vjepa.checkpoints.owners import bytes_of, owners_of
from vjepa.config import Run
from vjepa.engine.rehearsal import Rehearsal, rehearse
from vjepa_data.errors import BadInput

MakeRun = Callable[..., Run]


@pytest.fixture(scope="module")
def rehearsals(tiny_run: MakeRun) -> dict[int, Rehearsal]:
    run = tiny_run(batch_size=32, data={"sources": [{"shards": "missing"}]})
    rehearse(run, ranks=8)  # imports modules, which opens files once
    return {ranks: rehearse(run, ranks=ranks, clips=10**6) for ranks in (8, 16)}


def test_no_stage_opens_more_files_on_more_ranks(rehearsals: dict[int, Rehearsal]) -> None:
    eight, sixteen = (rehearsals[ranks].costs for ranks in (8, 16))
    for stage, cost in eight[0].items():
        assert sixteen[0][stage].files == cost.files, stage
        assert sixteen[15][stage].files == eight[7][stage].files, stage
    assert eight[0]["agree"].files > 100  # the code is read


def test_messages_of_a_rank_are_as_many_on_more_ranks(rehearsals: dict[int, Rehearsal]) -> None:
    eight, sixteen = (rehearsals[ranks].costs for ranks in (8, 16))
    for rank, other in ((0, 0), (7, 15)):
        assert {name: c.messages for name, c in eight[rank].items()} == {
            name: c.messages for name, c in sixteen[other].items()
        }


def test_a_checkpoint_has_an_entry_for_each_tensor_on_any_ranks(rehearsals: dict[int, Rehearsal]) -> None:
    # The messages of a plan hold entries. With a slice on each rank they would double. A further plan costs some names.
    saves = [rehearsals[ranks].costs[0]["save"] for ranks in (8, 16)]
    assert saves[1].received - saves[0].received < 8 * 4000


def test_the_table_and_the_numbers_agree(rehearsals: dict[int, Rehearsal]) -> None:
    found = rehearsals[16]
    assert f"{found.costs[0]['save'].messages:,}" in found.text()
    assert '"sockets": {\n  "0": 50,\n  "15": 33' in found.json()


def test_ranks_that_do_not_divide_the_batch_are_refused(tiny_run: MakeRun) -> None:
    with pytest.raises(BadInput, match="ranks"):
        rehearse(tiny_run(batch_size=8), ranks=3)


def test_owners_share_the_bytes_evenly() -> None:
    sizes = [7, 300, 12, 12, 100, 100, 100, 1, 0, 55]
    tensors = {f"t{number}": torch.empty(size) for number, size in enumerate(sizes)}
    owners = owners_of(tensors, 3)
    loads = [sum(bytes_of(tensors[name]) for name in tensors if owners[name] == rank) for rank in range(3)]
    assert max(loads) == 4 * 300
    assert min(loads) > 4 * 150
