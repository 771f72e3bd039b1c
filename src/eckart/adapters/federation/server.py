"""The server: rounds over clients that it samples, joins, counts the bytes of, and keeps the privacy accounts of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from eckart.adapters.federation.accountant import Steps, chosen, epsilon
from eckart.adapters.federation.clients import Client, LocalClient, Reply
from eckart.adapters.federation.rules import Rule, mean
from eckart.adapters.federation.state import State, layers_of, nbytes, pair_of, put_state, state_of, trained_names
from eckart.adapters.host import seeded


class Federation(Protocol):
    """How a server reaches its clients, which it knows by their numbers."""

    def sizes(self) -> list[int]:
        """Examples of each client."""

    def train(self, clients: Sequence[int], sent: State, number: int) -> list[Reply]:
        """Have clients train in a round; their replies, in this order."""


class InProcess:
    """Clients of this process, one after the other.

    Args:
        clients: at least one.

    Raises `ValueError` where two would draw the same noise.
    """

    def __init__(self, clients: Sequence[Client]):
        if not clients:
            raise ValueError("a federation needs at least one client")
        self.clients = list(clients)
        seeds = [c.seed for c in self.clients if isinstance(c, LocalClient) and c.privacy is not None]
        if len(set(seeds)) < len(seeds):
            raise ValueError("two clients have the same seed, and would draw the same noise: give each its own")

    def sizes(self) -> list[int]:
        return [c.examples for c in self.clients]

    def train(self, clients: Sequence[int], sent: State, number: int) -> list[Reply]:
        return [self.clients[k].train(sent, number) for k in clients]


@dataclass(frozen=True)
class Round:
    """What a round came to.

    Attributes:
        number: from 1.
        clients: who took part.
        loss: their mean; None where it is private.
        sent, received: bytes of tensors that the server sent to all of them, and got.
    """

    number: int
    clients: tuple[int, ...]
    loss: float | None
    sent: int
    received: int


@dataclass(frozen=True)
class Account:
    """What a client has spent of its privacy.

    Attributes:
        epsilon: an upper bound; None where nothing is certified, and `said` says why.
        delta: for which it holds.
        steps: local steps, of all rounds.
        said: which accountant, or why there is none.
    """

    epsilon: float | None
    delta: float
    steps: int
    said: str


class Server:
    """Holds the adapter of a model, and improves it in rounds.

    Clients have the same adapter, as it began, and keep nothing between rounds. What they train is sent to them each
    time, and so is what is frozen, once the server has changed it. A round depends on its number, the seed and the
    model alone, so that a run goes on from the saved model and `state_dict()`.

    Args:
        model: with an adapter on it; `dp_lora` and `fedsvd` say how uploads are joined, others take the mean.
        federation: the clients.
        per_round: how many are asked, drawn without replacement; None asks all.
        weights: `examples` weights clients by how many they have, `equal` does not.
        rule: how uploads are joined; what the adapter says, if not given.
        seed: of who is asked.

    Raises `ValueError` where settings do not fit each other.
    """

    def __init__(
        self, model: Any, federation: Federation, *, per_round: int | None = None, weights: str = "examples",
        rule: Rule | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.federation, self.seed, self.weights = model, federation, seed, weights
        self.sizes = federation.sizes()
        self.per_round = len(self.sizes) if per_round is None else per_round
        if not 1 <= self.per_round <= len(self.sizes):
            raise ValueError(f"server(per_round={per_round!r}): of {len(self.sizes)} clients, at least 1 and at most all are asked")  # fmt: skip # noqa: E501
        if min(self.sizes) < 1:
            raise ValueError(f"client {self.sizes.index(min(self.sizes))} has no data: leave it out of the federation")
        if weights not in ("examples", "equal"):
            raise ValueError(f"server(weights={weights!r}): it is 'examples' or 'equal'")
        self.trained = trained_names(model)
        self.rule = _rule_of(model) if rule is None else rule
        trains_A = any(name.endswith(".A") for name in self.trained)
        if layers_of(state_of(model)) and self.rule.trains_A not in (None, trains_A):
            have, need = ("trained", "frozen") if trains_A else ("frozen", "trained")
            raise ValueError(f"{type(self.rule).__name__} joins adapters whose A is {need}, and this one's is {have}: take {'fedsvd' if trains_A else 'dp_lora'}")  # fmt: skip # noqa: E501
        self.number = 0
        self.moved: set[str] = set()
        self.rounds: list[Round] = []
        self.spent: list[list[Steps]] = [[] for _ in self.sizes]
        self.uncertified: list[int] = [0] * len(self.sizes)

    def run(self, rounds: int) -> list[Round]:
        """So many more rounds."""
        return [self.round() for _ in range(rounds)]

    def round(self) -> Round:
        """One more round. Raises `ValueError` where a client uploads something else than was asked of it."""
        number = self.number + 1
        drawn = torch.randperm(len(self.sizes), generator=seeded(self.seed, f"round {number}"))
        clients = sorted(drawn[: self.per_round].tolist())
        state = state_of(self.model)
        sent = {n: t for n, t in state.items() if n in self.trained or n in self.moved}
        replies = self.federation.train(clients, sent, number)
        self._check(clients, replies, state)
        new = self._joined(state, replies, number)
        self.moved |= {n for n, t in new.items() if n not in self.trained and not _same(t, state[n])}
        put_state(self.model, new)
        for k, reply in zip(clients, replies, strict=True):
            if reply.spent is None:
                self.uncertified[k] += 1
            else:
                self.spent[k] = _more(self.spent[k], reply.spent)
        self.number = number
        losses = [r.loss for r in replies if r.loss is not None]
        loss = sum(losses) / len(losses) if losses else None
        self.rounds.append(Round(number, tuple(clients), loss, nbytes(sent) * len(clients), sum(nbytes(r.state) for r in replies)))  # fmt: skip # noqa: E501
        return self.rounds[-1]

    def privacy(self, delta: float, accountant: str = "auto") -> list[Account]:
        """What each client has spent, over all its local steps of all rounds so far.

        Raises `ValueError` where delta is not below one over a client's number of examples.
        """
        return [self._account(k, delta, accountant) for k in range(len(self.sizes))]

    def state_dict(self) -> dict[str, Any]:
        """What a run goes on from, beside the model; JSON-able."""
        spent = [[asdict(s) for s in steps] for steps in self.spent]
        return {
            "number": self.number,
            "moved": sorted(self.moved),
            "spent": spent,
            "uncertified": list(self.uncertified),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, after the model's tensors were put into place.

        Raises `ValueError` where it is of another number of clients.
        """
        if len(state["spent"]) != len(self.sizes):
            raise ValueError(f"the saved run has {len(state['spent'])} clients, and this one {len(self.sizes)}")
        self.number, self.moved, self.uncertified = state["number"], set(state["moved"]), list(state["uncertified"])
        self.spent = [[Steps(**s) for s in steps] for steps in state["spent"]]

    def _joined(self, state: State, replies: list[Reply], number: int) -> State:
        weights = [r.examples if self.weights == "examples" else 1 for r in replies]
        shares = [w / sum(weights) for w in weights]
        new: State = {}
        for layer in layers_of(state):
            pairs = [pair_of(state, layer, r.state) for r in replies]
            pair = self.rule.joined(pair_of(state, layer), pairs, shares, number, layer)
            new |= {f"{layer}.{n}": t for n, t in pair._asdict().items()}
        others = [n for n in self.trained if n not in new]
        return new | {n: mean([r.state[n] for r in replies], shares) for n in others}

    def _check(self, clients: list[int], replies: list[Reply], state: State) -> None:
        if len(replies) != len(clients):
            raise ValueError(f"{len(clients)} clients were asked, and {len(replies)} replied: run the round again")
        for k, reply in zip(clients, replies, strict=True):
            for name in self.trained:
                found = reply.state.get(name)
                if found is None or found.shape != state[name].shape:
                    what = "nothing" if found is None else f"a tensor of shape {tuple(found.shape)}"
                    raise ValueError(f"client {k} uploaded {what} for {name}, which has shape {tuple(state[name].shape)}: all need the same adapter, of the same rank")  # fmt: skip # noqa: E501
                if not bool(found.isfinite().all()):
                    raise ValueError(f"client {k} uploaded numbers for {name} that are not finite: its training has diverged; lower its learning rate, or its noise")  # fmt: skip # noqa: E501

    def _account(self, k: int, delta: float, accountant: str) -> Account:
        if not 0 < delta < 1 / self.sizes[k]:
            raise ValueError(f"delta={delta!r}: client {k} has {self.sizes[k]} examples, and delta must lie between 0 and {1 / self.sizes[k]:.3g}, one over that")  # fmt: skip # noqa: E501
        steps = sum(s.count for s in self.spent[k])
        if self.uncertified[k]:
            why = f"not certified: in {self.uncertified[k]} rounds its gradients were not clipped example by example and given noise"  # fmt: skip # noqa: E501
            return Account(None, delta, steps, why)
        return Account(epsilon(self.spent[k], delta, accountant), delta, steps, chosen(accountant))


def _rule_of(model: Any) -> Rule:
    active = getattr(model, "active_adapter", "default")
    config = getattr(model, "peft_config", {}).get(active if isinstance(active, str) else active[0])
    make = getattr(config, "rule", Rule)
    rule: Rule = make()
    return rule


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a, b))


def _more(history: list[Steps], new: Steps) -> list[Steps]:
    if history and (history[-1].noise, history[-1].rate) == (new.noise, new.rate):
        return [*history[:-1], Steps(new.noise, new.rate, history[-1].count + new.count)]
    return [*history, new]
