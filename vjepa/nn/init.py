"""Initialization of parameters as a function of the seed and the parameter's name."""

import hashlib
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def init_weights(module: nn.Module, *, seed: int, name: str, std: float | Literal["fan_in"] = 0.02) -> None:
    """Initialize every parameter from the seed and the parameter's name alone.

    Matrices are normal with standard deviation `std`, or 1 / sqrt(inputs) with `fan_in`. Matrices that write into the
    residual stream (`attn.proj`, `mlp.fc2`) are divided by sqrt(2 * layer), layer = 1, 2, ... Norms are 1, biases and
    mask tokens zero. The embeddings that mark pictures and clips have a standard deviation of 1e-6. V-JEPA 2 truncates
    at an absolute value of 2, which is a hundred standard deviations and so has no effect.

    The values depend neither on the device nor on the sharding: each rank draws the full parameter on the CPU and keeps
    its shard.

    Args:
        module: a network. Its parameters may be sharded, or uninitialized after `to_empty`.
        seed: seed of the run.
        name: name of the network, which distinguishes parameters of the same name.
        std: standard deviation of matrices (`model.init_std`).
    """
    with torch.no_grad():
        for path, parameter in module.named_parameters():
            owner, _, last = path.rpartition(".")
            if last in ("bias", "mask_tokens"):
                parameter.zero_()
            elif "norm" in owner:
                parameter.fill_(1.0)
            else:
                digest = hashlib.blake2b(f"{seed}/{name}/{path}".encode(), digest_size=8).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
                if last.endswith("mod_embed"):
                    deviation = 1e-6
                else:
                    deviation = math.prod(parameter.shape[1:]) ** -0.5 if std == "fan_in" else std
                values = torch.empty(parameter.shape, dtype=torch.float32).normal_(std=deviation, generator=generator)
                if path.endswith(("attn.proj.weight", "mlp.fc2.weight")):
                    layer = int(path.split(".")[1]) + 1
                    values /= (2 * layer) ** 0.5
                assign(parameter, values)


def assign(parameter: Tensor, values: Tensor) -> None:
    """Copy full values into a parameter that may be sharded, without communication."""
    if isinstance(parameter, DTensor):
        full = values.to(parameter.device)
        shard = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(shard.to_local())
    else:
        parameter.copy_(values)
