"""DP-LoRA: rounds of clients that share both factors, the rules of joining them, and the bytes."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federated import CLASSES, WIDTH, adapted, drawn, federation, loss, measured, network, spread
from peft import PeftModel
from torch import Tensor, nn

from eckart import adapters
from eckart.adapters.federation import (
    InProcess,
    LocalClient,
    Privacy,
    Refresh,
    Reply,
    Residual,
    Rule,
    Server,
    Stack,
    Steps,
)
from eckart.adapters.federation.factors import Pair
from eckart.adapters.federation.rules import RULES
from eckart.adapters.federation.state import State, state_of
from eckart.testing.adapters import near

SHAPES = {"0": (16, WIDTH), "2": (CLASSES, 16)}


def outputs(model: nn.Module) -> Tensor:
    return model.eval()(drawn(20, 77)["x"]).detach()


def some(count: int, out: int = 10, rank: int = 3, width: int = 8, seed: int = 0) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)
    empty = (torch.zeros(out, 0), torch.zeros(0, width))
    return [Pair(torch.randn(out, rank, generator=generator), torch.randn(rank, width, generator=generator), *empty) for _ in range(count)]  # fmt: skip # noqa: E501


def product(pair: Pair) -> Tensor:
    return pair.B.double() @ pair.A.double() + pair.kept_B.double() @ pair.kept_A.double()


@pytest.mark.parametrize("mode", [None, "as described", "certified"])
def test_alone_without_clip_and_noise_it_is_lora_by_sgd_to_the_bit(mode: str | None) -> None:
    data, rounds, steps, batch, lr = drawn(24, 1), 2, 2, 6, 0.1
    privacy = None if mode is None else Privacy(clip=math.inf, noise=0.0, mode=mode)
    model = adapted("dp_lora")
    federation(model, [data], batch=batch, steps=steps, lr=lr, privacy=privacy).run(rounds)
    plain = adapted("dp_lora").train()
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr)
    for number in range(1, rounds + 1):
        generator = np.random.default_rng((100, number, 0))
        generator.integers(2**32)  # of dropout
        for _ in range(steps):
            optimizer.zero_grad()
            if mode == "certified":
                for i in (generator.random(24) < batch / 24).nonzero()[0].tolist():
                    loss(plain, {n: t[i : i + 1] for n, t in data.items()}).backward()
                for p in plain.parameters():
                    p.grad = None if p.grad is None else p.grad / batch
            else:
                rows = torch.from_numpy(generator.permutation(24)[:batch])
                loss(plain, {n: t[rows] for n, t in data.items()}).backward()
            optimizer.step()
    ours, theirs = state_of(model), state_of(plain)
    assert any(bool(t.any()) for n, t in ours.items() if n.endswith(".B"))
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_the_first_step_moves_no_A_but_by_noise() -> None:
    for privacy, moved in ((None, False), (Privacy(1.0, 1.0), True)):
        model = adapted("dp_lora")
        before = state_of(model)["0.A"]
        federation(model, [drawn(16, 1)], batch=8, lr=0.1, privacy=privacy).run(1)
        assert torch.equal(state_of(model)["0.A"], before) is not moved


@pytest.mark.parametrize("rule", [Rule(), Residual()])
def test_equal_uploads_are_joined_to_themselves(rule: Rule) -> None:
    pair, shares = some(1)[0], [0.2, 0.5, 0.3]
    found = rule.joined(pair, [pair, pair, pair], shares, 1, "layer")
    assert torch.equal(found.B, pair.B)
    assert torch.equal(found.A, pair.A)
    assert len(found.kept_A) == 0


@pytest.mark.parametrize("word", ["exact", "stack", "residual"])
def test_the_exact_rules_lose_nothing_of_the_mean_product_and_the_plain_one_does(word: str) -> None:
    now, *uploads = some(4)
    now = now._replace(kept_B=torch.randn(10, 2, generator=torch.Generator().manual_seed(7)), kept_A=torch.eye(8)[:2])
    shares = [0.5, 0.2, 0.3]
    before = now.kept_B.double() @ now.kept_A.double()
    expected = before + sum(p * u.B.double() @ u.A.double() for p, u in zip(shares, uploads, strict=True))
    found = RULES[word]().joined(now, uploads, shares, 3, "layer")
    assert float((product(found) - expected).norm() / expected.norm()) < 1e-6
    assert found.B.shape == (10, 3)
    assert found.A.shape == (3, 8)
    assert len(found.kept_A) <= 8
    plain = Rule().joined(now, uploads, shares, 3, "layer")
    assert float((product(plain) - expected).norm() / expected.norm()) > 0.1
    if word == "exact":
        U, S, V = torch.linalg.svd(expected - before)
        best = (U[:, :3] * S[:3]) @ V[:3]
        torch.testing.assert_close(found.B @ found.A, best.float(), rtol=1e-4, atol=1e-5)
    if word == "stack":
        assert not bool(found.B.any())
        assert bool(found.A.any())


@pytest.mark.parametrize("word", sorted(RULES))
def test_every_rule_trains_and_what_it_leaves_is_saved_and_is_a_lora(word: str, tmp_path: Path) -> None:
    model, test = adapted("dp_lora", aggregation=word), drawn(300, 8)
    before = measured(model, test)
    federation(model, spread(drawn(150, 3), 3), batch=8, steps=4, lr=0.3).run(4)
    assert measured(model, test) < 0.8 * before
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(network(), tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    for name, update in adapters.updates(model).items():
        host = model.get_submodule(f"base_model.model.{name}").host
        left, right = update.factors(host)  # type: ignore[misc]
        assert near(left @ right, update.delta(host))
        assert (len(update.kept_A) > 0) is (word != "mean")  # type: ignore[arg-type]
    merged = model.merge_and_unload()
    assert near(outputs(merged), outputs(again))


@pytest.mark.parametrize("weights", ["examples", "equal"])
def test_clients_are_weighted_by_their_examples_or_equally(weights: str) -> None:
    model = adapted("dp_lora")
    state = state_of(model)

    class Constant:
        def __init__(self, examples: int, value: float):
            self.examples, self.value = examples, value

        def train(self, sent: State, number: int) -> Reply:
            assert set(sent) == {f"{layer}.{n}" for layer in SHAPES for n in "AB"}
            return Reply({n: torch.full_like(t, self.value) for n, t in sent.items()}, self.examples)

    Server(model, InProcess([Constant(10, 1.0), Constant(30, 2.0)]), weights=weights).round()
    expected = 1.75 if weights == "examples" else 1.5
    assert all(bool((t == expected).all()) for n, t in state_of(model).items() if n[-2:] in (".A", ".B"))
    assert state.keys() == state_of(model).keys()


def test_bytes_of_a_round_are_those_of_the_factors_each_way() -> None:
    server = federation(adapted("dp_lora", rank=3), [drawn(10, k) for k in range(4)], {"per_round": 3}, batch=4)
    expected = 4 * 3 * sum(3 * (out + in_) for out, in_ in SHAPES.values())
    for found in server.run(2):
        assert found.sent == found.received == expected
    assert expected < 4 * 3 * sum(out * in_ for out, in_ in SHAPES.values())


def test_clients_are_sampled_anew_each_round_and_a_run_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    parts = [drawn(12, k) for k in range(5)]

    def made(model: Any) -> Server:
        privacy = Privacy(1.0, 1.2, vectorised=True)
        return federation(model, parts, {"per_round": 2, "seed": 3}, batch=4, lr=0.2, privacy=privacy)

    whole = made(adapted("dp_lora", aggregation="residual"))
    whole.run(4)
    asked = [r.clients for r in whole.rounds]
    assert all(len(set(c)) == 2 for c in asked)
    assert len(set(asked)) > 1
    first = made(adapted("dp_lora", aggregation="residual"))
    first.run(2)
    first.model.save_pretrained(tmp_path)
    state = json.loads(json.dumps(first.state_dict()))
    second = made(PeftModel.from_pretrained(network(), tmp_path, is_trainable=True))
    second.load_state_dict(state)
    second.run(2)
    assert all(torch.equal(t, state_of(whole.model)[n]) for n, t in state_of(second.model).items())
    assert second.privacy(1e-3, "rdp") == whole.privacy(1e-3, "rdp")
    counts = [sum(k in c for c in asked) for k in range(5)]
    assert [a.steps for a in whole.privacy(1e-3, "rdp")] == counts


def test_a_new_head_other_adapters_and_whole_models_are_joined_by_the_mean() -> None:
    model = adapted("dp_lora", target_modules=["0"], modules_to_save=["2"])
    head = next(n for n in state_of(model) if n.endswith("weight"))
    before = state_of(model)[head]
    server = federation(model, [drawn(20, 1), drawn(20, 2)], batch=8, lr=0.1)
    server.run(1)
    assert not torch.equal(state_of(model)[head], before)
    for other in (adapters.adapt(network(), "svfit", rank=3, target_modules=["0"]), network()):
        start = measured(other, drawn(200, 5))
        federation(other, [drawn(60, 1), drawn(60, 2)], batch=16, steps=5, lr=0.3).run(4)
        assert measured(other, drawn(200, 5)) < start
    with pytest.raises(ValueError, match="the model trains nothing"):
        federation(network().requires_grad_(False), [drawn(10, 1)])


def test_a_client_with_its_own_model_learns_the_same() -> None:
    parts = [drawn(20, 1), drawn(20, 2)]
    shared = federation(adapted("dp_lora", aggregation="stack"), parts, batch=4, lr=0.2)
    words: dict[str, Any] = {"batch": 4, "lr": 0.2, "loss": loss}
    clients = [LocalClient(adapted("dp_lora"), p, seed=100 + k, **words) for k, p in enumerate(parts)]
    apart = Server(adapted("dp_lora", aggregation="stack"), InProcess(clients))
    for server in (shared, apart):
        server.run(3)
    assert all(torch.equal(t, state_of(apart.model)[n]) for n, t in state_of(shared.model).items())
    assert apart.rounds[1].sent > apart.rounds[0].sent, "what is kept is sent, too"


def test_bad_input_is_named() -> None:
    data, model = drawn(10, 1), adapted("dp_lora")
    with pytest.raises(ValueError, match="a client has no data"):
        LocalClient(model, {n: t[:0] for n, t in data.items()}, seed=0)
    with pytest.raises(ValueError, match=r"client\(batch=11\): the client has 10 examples"):
        LocalClient(model, data, seed=0, batch=11)
    with pytest.raises(ValueError, match=r"client\(steps=0\)"):
        LocalClient(model, data, seed=0, steps=0)
    with pytest.raises(ValueError, match=r"client\(seed=-1\)"):
        LocalClient(model, data, seed=-1)
    with pytest.raises(ValueError, match="at least one client"):
        InProcess([])
    twins = [LocalClient(model, data, seed=4, loss=loss, privacy=Privacy()) for _ in range(2)]
    with pytest.raises(ValueError, match="would draw the same noise"):
        InProcess(twins)
    with pytest.raises(ValueError, match=r"server\(per_round=3\): of 2 clients"):
        federation(model, [data, data], {"per_round": 3})
    with pytest.raises(ValueError, match=r"server\(weights='size'\)"):
        federation(model, [data], {"weights": "size"})
    with pytest.raises(ValueError, match="Refresh joins adapters whose A is frozen, and this one's is trained: take fedsvd"):  # fmt: skip # noqa: E501
        federation(model, [data], {"rule": Refresh()})
    with pytest.raises(ValueError, match="Stack joins adapters whose A is trained, and this one's is frozen: take dp_lora"):  # fmt: skip # noqa: E501
        federation(adapted("fedsvd"), [data], {"rule": Stack()})
    with pytest.raises(ValueError, match=r"0\.B was sent with shape \(16, 2\), and is \(16, 4\) here"):
        LocalClient(model, data, seed=0, loss=loss).train(state_of(adapted("dp_lora", rank=2)), 1)
    narrow = LocalClient(adapted("dp_lora", rank=2), data, seed=0, loss=loss)
    narrow.train = lambda sent, number: Reply(state_of(narrow.model), 10)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"client 0 uploaded a tensor of shape \(16, 2\) for 0\.B"):
        Server(model, InProcess([narrow])).round()
    with pytest.raises(ValueError, match="has no such tensor"):
        LocalClient(model, data, seed=0, loss=loss).train({"7.B": torch.zeros(2, 2)}, 1)
    with pytest.raises(ValueError, match="has 2 clients, and this one 1"):
        federation(model, [data]).load_state_dict({"number": 1, "moved": [], "spent": [[], []], "uncertified": [0, 0]})
    with pytest.raises(ValueError, match=r"client 0 uploaded numbers for .* that are not finite"):
        federation(model, [data], lr=1e38).run(2)
    for settings in ({"rank": 0}, {"alpha": -1.0}, {"aggregation": "median"}):
        with pytest.raises(ValueError, match=rf"dp_lora\({next(iter(settings))}="):
            adapted("dp_lora", **settings)
    with pytest.raises(ValueError, match="2: rank 7 is more than a matrix of shape"):
        adapted("dp_lora", rank=7)


@pytest.mark.skipif(importlib.util.find_spec("flwr") is not None, reason="flwr is installed")
def test_without_flower_it_says_what_to_install() -> None:
    from eckart.adapters.federation import flower

    for make in (lambda: flower.Flower(None), lambda: flower.client_app(lambda k: None)):  # type: ignore[arg-type, return-value]
        with pytest.raises(ImportError, match=r"eckart\[federation\]"):
            make()


@pytest.mark.skipif(importlib.util.find_spec("flwr") is None, reason="flwr is not installed")
def test_clients_behind_flower_learn_what_those_of_this_process_do() -> None:
    from flwr.app import Context, RecordDict

    from eckart.adapters.federation import flower

    parts = [drawn(20, 1), drawn(24, 2), drawn(30, 3)]
    words: dict[str, Any] = {"batch": 4, "lr": 0.2, "loss": loss, "privacy": Privacy(1.0, 1.1, vectorised=True)}
    app = flower.client_app(lambda k: LocalClient(adapted("dp_lora"), parts[k], seed=100 + k, **words))

    class Loop:
        """Hands messages to the app, as nodes with the numbers 9, 8 and 7 would."""

        def get_node_ids(self) -> list[int]:
            return [7, 8, 9]

        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Iterator[Any]:
            for message in reversed(list(messages)):
                node = message.metadata.dst_node_id
                config: Any = {"partition-id": 9 - node, "num-partitions": 3}
                yield app(message, Context(1, node, config, RecordDict(), {}))

    behind = Server(adapted("dp_lora", aggregation="residual"), flower.Flower(Loop(), count=3), per_round=2)
    here = federation(adapted("dp_lora", aggregation="residual"), parts, {"per_round": 2}, **{n: v for n, v in words.items() if n != "loss"})  # fmt: skip # noqa: E501
    assert behind.sizes == [20, 24, 30]
    assert behind.run(3) == here.run(3)
    assert behind.privacy(1e-3, "rdp") == here.privacy(1e-3, "rdp")
    assert all(torch.equal(t, state_of(here.model)[n]) for n, t in state_of(behind.model).items())
    assert behind.spent[0] == [Steps(1.1, 4 / 20, behind.spent[0][0].count)]
