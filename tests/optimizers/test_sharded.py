"""Parameters that FSDP2 spreads over two processes are updated as whole ones are."""

from __future__ import annotations

from pathlib import Path

import torch
from drive import parameter, reloaded
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import tiny
from eckart.optimizers import Fira, GaLore, LionK, convex, param_groups

WORLD, STEPS = 2, 5


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12), nn.LayerNorm(12))


def optimizers(net: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """Column scaling, a plain rule that works on shards, and one that needs whole tensors."""
    return {
        "galore": GaLore(param_groups(net, rank=3, interval=2), lr=0.05),
        "fira": Fira(param_groups(net, rank=3, interval=2), lr=0.05),
        "lion": LionK(net.parameters(), lr=0.05, kernel=convex.PNorm(2.0)),
    }


def run(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        x, wanted = parameter(6, 12, seed=step).detach(), parameter(6, 12, seed=100 + step).detach()
        (net(x) - wanted).square().sum().backward()
        optimizer.step()
        if step == 2:
            optimizer.load_state_dict(reloaded(optimizer.state_dict()))


def worker(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    found = {}
    for name in optimizers(model()):
        net = fully_shard(model(), mesh=mesh)
        optimizer = optimizers(net)[name]
        assert all(isinstance(p, DTensor) for p in net.parameters())
        run(net, optimizer)
        if name == "galore":
            # moments of other parameters are as large as their shards
            assert all(optimizer.state[p]["exp_avg"].shape == p.to_local().shape for p in net[3].parameters())
        found |= {f"{name}.{n}": p.full_tensor().detach().clone() for n, p in net.named_parameters()}
    save_file(found, folder / f"rank-{rank}.safetensors")


def test_sharded_parameters_are_updated_as_whole_ones(tmp_path: Path) -> None:
    whole = {}
    with tiny.two_processes(worker, tmp_path):
        for name in optimizers(model()):
            net = model()
            run(net, optimizers(net)[name])
            whole |= {f"{name}.{n}": p.detach() for n, p in net.named_parameters()}
    for rank in range(WORLD):
        found = load_file(tmp_path / f"rank-{rank}.safetensors")
        assert found.keys() == whole.keys()
        for name, p in found.items():
            torch.testing.assert_close(p, whole[name], atol=1e-5, rtol=1e-5, msg=name)
