"""The optimizer step: which parameters decay, and when a step is skipped."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from vjepa.compat import adamw_, local, scale_
from vjepa.config import Optim
from vjepa.engine.schedule import Rates
from vjepa.methods.base import named_parameters


@dataclass(frozen=True)
class Update:
    """Result of a step, still on the device. Reading it waits for the device."""

    grad_norm: Float[Tensor, ""]
    """Global norm of the gradient, before clipping. Not finite when the step was skipped."""

    applied: Float[Tensor, ""]
    """1 when the weights moved, 0 when the step was skipped."""


def build_optimizer(trained: Mapping[str, nn.Module], optim: Optim) -> torch.optim.AdamW:
    """Return AdamW over networks that are already sharded, with its state allocated.

    Matrices decay. Biases, norms and other vectors do not. Mask tokens count as a matrix, as in V-JEPA 2.

    Source: facebookresearch/vjepa2, `init_opt`: no decay for biases and one-dimensional parameters.
    """
    named = named_parameters(trained)
    vectors = [p for name, p in named.items() if p.ndim < 2 or name.endswith(".bias")]
    matrices = [p for name, p in named.items() if not (p.ndim < 2 or name.endswith(".bias"))]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "decays": True}, {"params": vectors, "decays": False}],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=True,  # the fused kernel can also skip a step, with its counter, without asking the host
    )
    for parameter in named.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


@torch.no_grad()
@record_function("optimizer step")  # its name in a trace
def update_weights(
    optimizer: torch.optim.AdamW, loss: Float[Tensor, ""], rates: Rates, *, clip_norm: float | None
) -> Update:
    """Update the weights, or skip the step if the loss or any gradient is not finite.

    All ranks decide alike without the host: the norm is a sum over all shards and the loss a sum over all ranks, so a
    number that is not finite on any rank makes them not finite on every rank.

    Args:
        optimizer: with gradients that are already averaged over ranks.
        loss: loss of the whole step, summed over ranks.
        rates: learning rate and weight decay of this step.
        clip_norm: largest norm of the gradient, or None for no clipping.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # Everything below works on this rank's shards: as DTensors they would cost the host four times as much.
    gradients = [local(p.grad) for p in parameters]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    if isinstance(parameters[0], DTensor):
        norm = _norm_over_shards(norm, parameters[0].device_mesh)
    finite = torch.isfinite(norm) & torch.isfinite(loss).to(norm.device)  # on the host for offloaded weights
    if clip_norm is not None:
        scale_(gradients, (clip_norm / (norm + 1e-6)).clamp(max=1.0))  # as torch.nn.utils.clip_grads_with_norm_
    for group in optimizer.param_groups:
        group["lr"] = rates.lr
        group["weight_decay"] = rates.weight_decay if group["decays"] else 0.0
        members = [p for p in group["params"] if p.grad is not None]
        if members:
            adamw_(
                {
                    "params": [local(p) for p in members],
                    "grads": [local(p.grad) for p in members],
                    "exp_avgs": [local(optimizer.state[p]["exp_avg"]) for p in members],
                    "exp_avg_sqs": [local(optimizer.state[p]["exp_avg_sq"]) for p in members],
                    "state_steps": [optimizer.state[p]["step"] for p in members],
                },
                skip=~finite,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
            )
    for parameter in parameters:
        parameter.grad = None
    return Update(grad_norm=norm, applied=finite.to(torch.float32))


def _norm_over_shards(norm: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the norm over all shards, given that of this rank's. Replicas hold the same shards, and count once."""
    squared = norm.square()
    dist.all_reduce(squared, group=mesh.get_group(mesh.ndim - 1))
    return squared.sqrt()
