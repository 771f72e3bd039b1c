"""Optimisers in the catalogue: registered, documented, and not offered where something is compressed."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from eckart.compression import method_for
from eckart.optimizers import DCT, Every, Lazy, Lion, Projected, Sign, param_groups
from eckart.registry import entries, find

KEYS = ["dct_adamw", "fira", "frugal", "galore", "lion_k", "q_galore"]


def test_every_preset_is_registered_under_its_files_name() -> None:
    found = entries("optimizers")
    assert [e.key for e in found] == sorted([*KEYS, "l_greco"])
    for e in found:
        if e.key == "l_greco":  # a communication hook, which any optimiser follows
            continue
        assert e.cls.__module__ == f"eckart.optimizers.{e.key}"
        assert issubclass(e.cls, Projected)
        assert issubclass(e.cls, torch.optim.Optimizer)
        assert len(e.cls.__mro__) - len(torch.optim.Optimizer.__mro__) == 2
        assert re.search(r"\d{4}\.\d{5}", e.paper)


@pytest.mark.parametrize("key", [*KEYS, "l_greco"])
def test_every_setting_is_explained(key: str) -> None:
    cls = find(key, "optimizers").cls
    _, _, listed = inspect.cleandoc(cls.__doc__).partition("\nArgs:\n")
    explained = {name.strip() for line in re.findall(r"^ {4}(\w[^:]*):", listed, re.M) for name in line.split(",")}
    assert explained == set(inspect.signature(cls).parameters)


def test_an_optimiser_is_not_a_way_to_compress() -> None:
    with pytest.raises(ValueError, match=r"'galore' is one of eckart\.optimizers, not of eckart\.compression"):
        method_for("galore")
    with pytest.raises(ValueError, match="unknown method 'galor'"):
        method_for("galor")


def test_a_combination_of_parts_that_no_paper_wrote_learns() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))
    groups, x = param_groups(model, rank=3), torch.randn(32, 8)
    refresh = Every(stagger=True)
    optimizer = Projected(groups, projector=DCT(), inner=Lion(), refresh=refresh, residual=Sign(0.1), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    lazy = Projected(param_groups(model, rank=3), projector=DCT(), inner=Lion(), refresh=Lazy(), lr=1e-3, interval=1)
    (model(x) - x).square().mean().backward()
    lazy.step()
    with pytest.raises(TypeError, match="only selects"):
        lazy.step()
