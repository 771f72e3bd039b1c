"""Parameters that are spread over processes (DTensor, as FSDP2 makes them)."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def whole(x: Tensor) -> Tensor:
    """All of a tensor, on every process."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor) -> Tensor:
    """The part that this process holds; writing into it writes into the tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def onto(x: Tensor, p: Tensor) -> Tensor:
    """The part of a whole tensor that belongs to this process's part of a parameter."""
    if not isinstance(p, DTensor):
        return x
    replicated = DTensor.from_local(x, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
    return replicated.redistribute(placements=p.placements).to_local()
