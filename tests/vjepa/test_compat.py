"""Private parts of torch behave as `vjepa.compat` expects. If a test fails after an upgrade, adapt that module."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._C import _distributed_c10d as c10d
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vjepa import compat
from vjepa.checkpoints.safe_unpickle import unpickle_metadata
from vjepa.distributed.world import World


def test_a_local_store_keeps_values() -> None:
    store = compat.local_store()
    store.set("name", "value")
    assert isinstance(store, c10d.Store)
    assert store.get("name") == b"value"
    with pytest.raises(dist.DistStoreError):
        store.wait(["absent"], timedelta(milliseconds=1))


def test_flight_records_name_collectives(world: World) -> None:
    world.sum(torch.ones(3))
    last = compat.flight_records()[-1]
    assert last["profiling_name"] == "gloo:all_reduce"
    assert last["input_sizes"] == [[3]]
    assert not last["is_p2p"]
    assert last["collective_seq_id"] >= 1
    assert last["process_group"]


def test_recorders_of_nccl_and_gloo_are_read(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.sum(torch.ones(1))
    # Only a build of torch with NCCL has this recorder.
    monkeypatch.setattr(c10d, "_dump_nccl_trace_json", lambda: b'{"entries": [{"of": "nccl"}]}', raising=False)
    entries = compat.flight_records()
    assert entries[0] == {"of": "nccl"}
    assert entries[-1]["profiling_name"] == "gloo:all_reduce"


def test_cpu_attention_equals_public_attention() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4, generator=torch.Generator().manual_seed(0)).unbind()
    mask = torch.full((1, 1, 5, 5), -torch.inf).triu(1)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(compat.CPU_ATTENTION(q, k, v, attn_mask=mask)[0], expected)
    on_meta = compat.CPU_ATTENTION(*(x.to("meta") for x in (q, k, v)), attn_mask=mask.to("meta"))[0]
    assert on_meta.shape == expected.shape


def test_cpu_attention_calls_its_backward_operation() -> None:
    seen = []

    class Record(compat.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    q = torch.randn(1, 1, 4, 8, requires_grad=True)
    with Record():
        compat.CPU_ATTENTION(q, q, q)[0].sum().backward()
    assert {compat.CPU_ATTENTION, compat.CPU_ATTENTION_BACKWARD} <= set(seen)


@pytest.mark.parametrize("name", compat.ATTENTION_OPERATIONS)
def test_attention_operations_exist(name: str) -> None:
    import torch.nn.attention.varlen

    package, operation, overload = name.split(".")
    assert str(getattr(getattr(getattr(torch.ops, package), operation), overload)) == name


@pytest.mark.parametrize("is_finite", [True, False])
def test_a_fused_step_is_skipped_with_its_counter(is_finite: bool) -> None:
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    tensors = {name: [torch.full((3,), float(name in ("params", "grads")))] for name in names}
    tensors["state_steps"] = [torch.zeros(())]
    rates = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8}
    compat.adamw_(tensors, skip=torch.tensor(not is_finite), **rates)
    assert (tensors["params"][0] != 1).all() == is_finite
    assert tensors["state_steps"][0] == int(is_finite)


def test_tensors_are_scaled_by_a_number_on_the_device() -> None:
    tensors = [torch.ones(2), torch.full((1,), 3.0)]
    compat.scale_(tensors, torch.tensor(0.5))
    assert [tensor.tolist() for tensor in tensors] == [[0.5, 0.5], [1.5]]


def test_a_forward_pass_without_a_backward_pass_leaves_no_record(world: World) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).requires_grad_(False)
    for layer in network:
        fully_shard(layer, mesh=world.mesh)
    context = fully_shard(network, mesh=world.mesh, reshard_after_forward=True)._get_fsdp_state()._comm_ctx
    for _ in range(3):
        network(torch.ones(1, 2))
        assert len(context.post_forward_order) > 0
        compat.forget_forward(network)
        assert len(context.post_forward_order) == 0
    weight = network[0].weight
    assert isinstance(weight, DTensor)
    assert compat.local(weight).data_ptr() == weight.to_local().data_ptr()


def test_tensors_move_towards_goals() -> None:
    tensors, goals = [torch.zeros(2), torch.ones(1)], [torch.full((2,), 4.0), torch.full((1,), 3.0)]
    compat.move_towards(tensors, goals, torch.tensor(0.25))
    assert [tensor.tolist() for tensor in tensors] == [[1.0, 1.0], [1.5]]


def test_the_limit_of_compiled_variants_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    compat.keep_compiled_variants(64)
    assert torch._dynamo.config.recompile_limit == 64


def test_views_share_a_storage_key() -> None:
    tensor, other = torch.empty(4, device="meta"), torch.empty(4, device="meta")
    assert compat.storage_key(tensor.untyped_storage()) == compat.storage_key(tensor[1:].untyped_storage())
    assert compat.storage_key(tensor.untyped_storage()) != compat.storage_key(other.untyped_storage())


def test_leaves_of_a_tree_are_listed() -> None:
    assert compat.tree_leaves({"a": [1, (2, 3)], "b": 4}) == [1, 2, 3, 4]


def test_square_sums_and_differences_are_those_of_single_tensors() -> None:
    tensors = [torch.tensor([3.0, 4.0]), torch.tensor([[12.0]])]
    others = [torch.tensor([1.0, 4.0]), torch.tensor([[9.0]])]
    assert compat.square_sum(tensors) == 9 + 16 + 144
    assert compat.square_sum(compat.differences(tensors, others)) == 4 + 9
    assert compat.square_sum(tensors).dtype == torch.float64


def test_pretended_writes_are_reports_that_metadata_can_hold(tmp_path: Path) -> None:
    planner = DefaultSavePlanner()
    planner.set_up_planner({"a": torch.ones(3), "b": torch.ones(())}, is_coordinator=True)
    plans, metadata = planner.create_global_plan([planner.create_local_plan()])
    writer = FileSystemWriter(tmp_path)
    writer.finish(metadata, [compat.write_results(plans[0])])
    assert {index.fqn for index in unpickle_metadata(tmp_path).storage_data} == {"a", "b"}
