"""DiffoRA: gates that learn on held-out data, and the layers that they choose."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from planted import change
from torch import Tensor, nn

from eckart import adapters
from eckart.adapters.diffora import DiffoRA, Search
from eckart.testing.adapters import adapted, answers, batches, layers, near, small_model, trained

KINDS = ("q", "k", "v", "o")


class Grid(nn.Module):
    """Two blocks of four layers side by side; each layer has a part of the input to itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.ModuleDict({k: nn.Linear(8, 8) for k in KINDS}) for _ in range(2))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        parts = iter(x.unbind(1))
        y = torch.stack([block[k](next(parts)) for block in self.blocks for k in KINDS], 1)
        return SimpleNamespace(y=y, loss=None if labels is None else (y - labels).square().mean())


def names() -> list[str]:
    return [f"blocks.{i}.{k}" for i in range(2) for k in KINDS]


def planted(seed: int) -> set[str]:
    """Two layers of each block."""
    generator = torch.Generator().manual_seed(seed)
    picked = [torch.randperm(4, generator=generator)[:2].tolist() for _ in range(2)]
    return {f"blocks.{i}.{KINDS[j]}" for i in range(2) for j in picked[i]}


def data(chosen: set[str], count: int, seed: int) -> list[dict[str, Tensor]]:
    """What a teacher answers that differs from `Grid` in the chosen layers, with noise."""
    teacher, generator, found = Grid(), torch.Generator().manual_seed(seed), []
    for name in sorted(chosen):
        teacher.get_submodule(name).weight.data += change(2, seed=len(name))
    for _ in range(count):
        x = torch.randn(16, 8, 8, generator=generator)
        with torch.no_grad():
            found.append({"x": x, "labels": teacher(x).y + 0.3 * torch.randn(16, 8, 8, generator=generator)})
    return found


def put(validation: Any, **settings: Any) -> Any:
    words = {"rank": 2, "alpha": 2.0, "search": 25, "warmup": 8, "gate_lr": 2e-2, "target_modules": list(KINDS)}
    return adapters.adapt(Grid(), "diffora", data=validation, **{**words, **settings})


def run(model: Any, batches: list[Any], schedule: Any) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2, weight_decay=0.0)
    model.train()
    schedule.begin(optimizer, len(batches))
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def updates(model: Any) -> dict[str, Any]:
    return {layer.host.name: layer.updates["default"] for layer in layers(model)}


def chosen(model: Any) -> set[str]:
    return {n for n, u in updates(model).items() if float(u.gate)}


def test_the_planted_layers_are_found_and_random_ones_do_worse(tmp_path: Path) -> None:
    hits = 0
    for seed in range(5):
        truth = planted(seed)
        train, held_out = data(truth, 25, seed), data(truth, 10, 100 + seed)
        model = put(held_out, seed=seed)
        run(model, train, adapters.schedule(model))
        hits += chosen(model) == truth
    assert hits >= 4

    truth = planted(0)
    train, held_out = data(truth, 100, 0), data(truth, 10, 100)
    model = put(held_out)
    run(model, train, schedule := adapters.schedule(model))
    schedule.finish()
    assert {n for n, r in model.peft_config["default"].rank_pattern.items() if r} == truth
    random = put(held_out, rank_pattern={n: 2 * (n in planted(1)) for n in names()})
    run(random, train, adapters.schedule(random))
    with torch.no_grad():
        found, other = (sum(float(m(**b).loss) for b in held_out) for m in (model, random))
    assert found < 0.8 * other
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * 2 * 16
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Grid(), tmp_path, is_trainable=True)
    assert torch.equal(loaded(held_out[0]["x"]).y, model(held_out[0]["x"]).y)
    assert sum(p.numel() for p in loaded.parameters() if p.requires_grad) == 4 * 2 * 16
    assert not isinstance(adapters.schedule(loaded), Search)


def test_gates_of_one_are_lora_and_gates_of_zero_the_model() -> None:
    plain, model = answers(small_model()), adapted("diffora")
    for layer in layers(model):
        layer.updates["default"].B.data.normal_()
    update = updates(model)["model.layers.0.self_attn.q_proj"]
    x, host = torch.randn(3, 16), layers(model)[0].host
    assert near(update(x, torch.zeros(3, 16), host), 16 / 4 * (x @ update.A.T @ update.B.T))
    for u in updates(model).values():
        u.gate.zero_()
    assert torch.equal(answers(model), plain)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_the_gradient_of_a_gate_is_what_the_pair_would_change(gate: str) -> None:
    batch = data(planted(0), 1, 0)[0]
    model = put([batch], gate=gate)
    for u in updates(model).values():
        u.B.data.normal_()
    search: Any = adapters.schedule(model)
    logits = torch.randn(8, requires_grad=True)
    search._set(search.relaxed(logits))
    y = model(x=batch["x"]).y
    upstream = 2 * (y - batch["labels"]) / y.numel()
    (found,) = torch.autograd.grad((y - batch["labels"]).square().mean(), logits)
    slopes = torch.stack([
        (upstream[:, i] * (batch["x"][:, i] @ u.A.T @ u.B.T)).sum() for i, u in enumerate(updates(model).values())
    ])  # fmt: skip
    jacobian = torch.autograd.functional.jacobian(search.relaxed, logits.detach())
    assert near(found, slopes @ jacobian, 1e-5)
    if gate == "softmax":
        share = logits[:4].softmax(0)
        assert near(jacobian[:4, :4], 4 * (share.diag() - share[:, None] * share), 1e-6)
        assert not jacobian[:4, 4:].any()
    else:
        assert near(jacobian, (logits.sigmoid() * (1 - logits.sigmoid())).diag(), 1e-6)


def test_gates_follow_adam_on_held_out_data_and_the_pairs_do_not() -> None:
    held_out = data(planted(0), 3, 1)
    model = put(held_out, gate="sigmoid")
    for u in updates(model).values():
        u.B.data.normal_(std=0.1)
    search: Any = adapters.schedule(model)
    before = [p.detach().clone() for p in model.parameters()]
    logits = nn.Parameter(torch.zeros(8))
    adam = torch.optim.Adam([logits], 2e-2, betas=(0.5, 0.999))
    for count in range(1, 6):
        search._set(logits.sigmoid())
        adam.zero_grad()
        logits.grad = torch.autograd.grad(model(**held_out[(count - 1) % 3]).loss, logits)[0]
        adam.step()
        search.learn(count)
        assert near(torch.stack([u.search[0] for u in updates(model).values()]), logits, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_gates_stay_in_the_warm_up_and_their_entropy_is_noted() -> None:
    model = put(data(planted(0), 2, 1))
    search: Any = adapters.schedule(model)
    run(model, data(planted(0), 8, 0), _of_length(search, 60))
    assert {float(u.gate) for u in updates(model).values()} == {1.0}
    assert search.entropies == []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    search.begin(optimizer, 60)
    optimizer.step()
    search.step()
    assert search.entropies[0] == pytest.approx(math.log(4), abs=1e-2)
    assert any(float(u.gate) != 1 for u in updates(model).values())
    with pytest.raises(RuntimeError, match="ends at step 25, and training stopped at step 9"):
        search.finish()


def _of_length(search: Any, total: int) -> Any:
    """The schedule, told another total than the number of batches."""
    begin = search.begin
    search.begin = lambda optimizer, _: begin(optimizer, total)
    return search


def test_a_search_that_was_cut_goes_on_as_if_it_had_not_been() -> None:
    train, held_out = data(planted(0), 40, 0), data(planted(0), 3, 1)
    whole = put(held_out)
    run(whole, train, adapters.schedule(whole))
    state: Any = None
    for part in (train[:15], train[15:]):
        model = put(held_out)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2, weight_decay=0.0)
        schedule = adapters.schedule(model)
        if state:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
            schedule.load_state_dict(state[2])
        model.train()
        schedule.begin(optimizer, 40)
        for batch in part:
            model(**batch).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        state = (model.state_dict(), optimizer.state_dict(), schedule.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), state[0].values(), strict=True))


def test_dropped_layers_of_a_kind_may_share_a_pair(tmp_path: Path) -> None:
    truth = {"blocks.0.q", "blocks.0.k", "blocks.1.q", "blocks.1.v"}
    model = put(data(truth, 10, 1), share_rest=True)
    run(model, data(truth, 80, 0), schedule := adapters.schedule(model))
    assert chosen(model) == truth
    schedule.finish()
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    kinds = {n.rpartition("_")[2] for n in learning if "of_all_layers" in n}
    assert kinds == {"k", "v", "o"}  # q is chosen everywhere
    assert sum(p.numel() for p in learning.values()) == 4 * 2 * 16 + 3 * 2 * 16
    (o_0, o_1) = (updates(model)[f"blocks.{i}.o"].factors(layers(model)[0].host) for i in range(2))
    assert o_0[1] is o_1[1]
    assert o_0[0].abs().max() > 0
    model.save_pretrained(tmp_path)
    x, loaded = data(truth, 1, 2)[0]["x"], PeftModel.from_pretrained(Grid(), tmp_path)
    assert torch.equal(loaded(x).y, model(x).y)


def test_layers_compete_in_blocks_or_in_the_whole_model() -> None:
    assert [g.tolist() for g in DiffoRA().grouped(names())] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [g.tolist() for g in DiffoRA(group="model").grouped(names())] == [list(range(8))]
    assert [g.tolist() for g in DiffoRA().grouped(["model.layers.0.mlp.experts.7.up", "head"])] == [[0], [1]]
    model = adapted("diffora", share=0.4)
    ranks = trained(model).peft_config["default"].rank_pattern
    assert [sum(r > 0 for n, r in ranks.items() if f"layers.{i}." in n) for i in range(2)] == [3, 3]  # round(0.4 * 7)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"share": 0.0}, "share=0.0"),
        ({"share": 1.5}, "share=1.5"),
        ({"gate": "hard"}, "'softmax' or 'sigmoid'"),
        ({"group": "head"}, "'block' or 'model'"),
        ({"search": 1.5}, r"diffora\(search\)=1.5"),
        ({"gate_lr": 0.0}, "gate_lr=0.0"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        put(batches(), **settings)


def test_a_search_without_held_out_data_or_room_is_refused() -> None:
    with pytest.raises(ValueError, match="give batches of it"):
        put(None)
    model = put(data(planted(0), 1, 0), warmup=50)
    with pytest.raises(ValueError, match="must end after the warm-up"):
        adapters.schedule(model).begin(None, 100)
    with pytest.raises(RuntimeError, match="has not begun"):
        adapters.schedule(model).finish()
    model.peft_config["default"].validation = []
    with pytest.raises(ValueError, match="kept from training"):
        adapters.schedule(model)
    silent = put([{"x": torch.zeros(2, 8, 8)}])
    with pytest.raises(ValueError, match=r"must hold its labels; .* set `loss`"):
        run(silent, data(planted(0), 60, 0), adapters.schedule(silent))


def test_a_loss_of_ones_own_leads_the_search_of_a_model_that_gives_none() -> None:
    held, learned = data(planted(0), 4, 1), data(planted(0), 60, 0)
    own, given = put(held), put([{"x": b["x"], "wanted": b["labels"]} for b in held])
    schedule = adapters.schedule(given)
    schedule.loss = lambda model, b: (model(b["x"]).y - b["wanted"]).square().mean()
    run(own, learned, adapters.schedule(own))
    run(given, learned, schedule)
    assert chosen(given) == chosen(own)
    for name, update in updates(given).items():
        assert torch.equal(update.search, updates(own)[name].search)


def test_a_kind_of_different_shapes_cannot_share() -> None:
    with pytest.raises(ValueError, match=r"layers\.1\.x: .* other x, which are 4 x 4 where it is 6 x 4"):
        adapters.adapt(
            nn.ModuleDict({
                "layers": nn.ModuleList([nn.ModuleDict({"x": nn.Linear(4, 4)}), nn.ModuleDict({"x": nn.Linear(4, 6)})])
            }),
            "diffora", data=batches(), rank=2, share_rest=True, target_modules=["x"],
        )  # fmt: skip
