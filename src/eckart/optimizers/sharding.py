"""Parameters that are spread over processes (DTensor, as FSDP2 makes them).

They are told by their methods: importing their class takes longer than importing all optimisers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def whole(x: Any) -> Tensor:
    """All of a tensor, on every process."""
    found: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return found


def local(x: Any) -> Tensor:
    """The part that this process holds; writing into it writes into the tensor."""
    found: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return found


def onto(x: Tensor, p: Any) -> Tensor:
    """The part of a whole tensor that belongs to this process's part of a parameter."""
    if not hasattr(p, "device_mesh"):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    replicated = DTensor.from_local(x, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
    return replicated.redistribute(placements=p.placements).to_local()
