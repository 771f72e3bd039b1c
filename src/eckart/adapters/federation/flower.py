"""A federation whose clients are nodes of Flower, in its simulation or on machines of their own.

    client_app = flower.client_app(make_client)          # make_client(index) -> Client

    server_app = flwr.serverapp.ServerApp()

    @server_app.main()
    def main(grid, context):
        Server(model, flower.Flower(grid)).run(100)

Flower reaches the nodes; who is asked, and what becomes of uploads, is `Server`'s, as with clients of one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from eckart.adapters.federation.accountant import Steps
from eckart.adapters.federation.clients import Client, Reply
from eckart.adapters.federation.state import State


class Flower:
    """The clients behind a grid of Flower.

    Args:
        grid: what Flower gives the server's main function.
        count: nodes to wait for.
        timeout: seconds to wait for nodes, and for the replies of a round; None waits for ever.

    Raises `ImportError` where Flower is not installed, `RuntimeError` where nodes or replies do not come.
    """

    def __init__(self, grid: Any, count: int = 1, timeout: float | None = 3600.0):
        self.flwr = _flower()
        self.grid, self.timeout = grid, timeout
        told = self._exchange(dict.fromkeys(self._awaited(count), self.flwr.RecordDict()), "query", "sizes")
        found = {int(r["client"]["index"]): (node, int(r["client"]["examples"])) for node, r in told.items()}
        self.nodes = [found[k][0] for k in sorted(found)]
        self._sizes = [found[k][1] for k in sorted(found)]
        if len(self.nodes) < len(told):
            raise RuntimeError(f"{len(told)} nodes are {len(self.nodes)} clients: give each its own partition-id")

    def sizes(self) -> list[int]:
        return list(self._sizes)

    def train(self, clients: Sequence[int], sent: State, number: int) -> list[Reply]:
        contents = {self.nodes[k]: self._sent(sent, number) for k in clients}
        replies = self._exchange(contents, "train", str(number))
        return [_reply(replies[self.nodes[k]]) for k in clients]

    def _sent(self, sent: State, number: int) -> Any:
        arrays, round_ = self.flwr.ArrayRecord(_on_cpu(sent)), self.flwr.ConfigRecord({"number": number})
        return self.flwr.RecordDict({"state": arrays, "round": round_})

    def _awaited(self, count: int) -> list[int]:
        begin = time.monotonic()
        while len(nodes := list(self.grid.get_node_ids())) < count:
            if self.timeout is not None and time.monotonic() - begin > self.timeout:
                raise RuntimeError(f"{len(nodes)} of {count} nodes of Flower came within {self.timeout} s: start more, or ask for fewer")  # fmt: skip # noqa: E501
            time.sleep(0.2)
        return nodes

    def _exchange(self, contents: dict[int, Any], kind: str, group: str) -> dict[int, Any]:
        messages = [self.flwr.Message(c, node, kind, group_id=group) for node, c in contents.items()]
        replies = list(self.grid.send_and_receive(messages, timeout=self.timeout))
        for reply in replies:
            if reply.has_error():
                raise RuntimeError(f"node {reply.metadata.src_node_id} failed to {kind}: {reply.error.reason}")
        found = {reply.metadata.src_node_id: reply.content for reply in replies}
        missing = sorted(set(contents) - set(found))
        if missing:
            raise RuntimeError(f"no reply to {kind!r} of node {missing[0]} within {self.timeout} s ({len(missing)} of {len(contents)} are missing)")  # fmt: skip # noqa: E501
        return found


def client_app(make: Callable[[int], Client]) -> Any:
    """Flower's `ClientApp` of clients; a node's number is its `partition-id`, as simulations set it.

    Args:
        make: makes client k, on the machine that holds its data; called for every message.

    Raises `ImportError` where Flower is not installed.
    """
    flwr = _flower()
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.query()
    def query(message: Any, context: Any) -> Any:
        index = int(context.node_config["partition-id"])
        client = flwr.MetricRecord({"index": index, "examples": make(index).examples})
        return flwr.Message(flwr.RecordDict({"client": client}), reply_to=message)

    @app.train()
    def train(message: Any, context: Any) -> Any:
        client = make(int(context.node_config["partition-id"]))
        sent = message.content["state"].to_torch_state_dict()
        reply = client.train(dict(sent), int(message.content["round"]["number"]))
        numbers: dict[str, Any] = {"examples": reply.examples}
        numbers |= {} if reply.loss is None else {"loss": reply.loss}
        numbers |= {} if reply.spent is None else asdict(reply.spent)
        records = {"state": flwr.ArrayRecord(_on_cpu(reply.state)), "client": flwr.MetricRecord(numbers)}
        return flwr.Message(flwr.RecordDict(records), reply_to=message)

    return app


def _reply(content: Any) -> Reply:
    numbers = dict(content["client"])
    spent = Steps(numbers["noise"], numbers["rate"], int(numbers["count"])) if "noise" in numbers else None
    state = dict(content["state"].to_torch_state_dict())
    return Reply(state, int(numbers["examples"]), spent, numbers.get("loss"))


def _on_cpu(state: State) -> State:
    return {name: t.detach().cpu().contiguous() for name, t in state.items()}


def _flower() -> Any:
    try:
        import flwr.app
    except ImportError as e:
        raise ImportError("clients on nodes of Flower need it: pip install 'eckart[federation]'; clients of one process need nothing, federation.InProcess") from e  # fmt: skip # noqa: E501
    return flwr.app
