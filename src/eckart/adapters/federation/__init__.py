"""Training an adapter on data that stays with its owners: clients, servers, rules, DP-SGD and its accounts.

model = adapt(model, "fedsvd", rank=8)
clients = [LocalClient(model, data, seed=k, privacy=Privacy(clip=2.0, noise=1.1)) for k, data in enumerate(parts)]
server = Server(model, InProcess(clients), per_round=3)
server.run(100)
server.privacy(delta=1e-5)
"""

from eckart.adapters.federation.accountant import Steps, epsilon, noise_for
from eckart.adapters.federation.clients import Client, LocalClient, Reply
from eckart.adapters.federation.privacy import Privacy
from eckart.adapters.federation.rules import Exact, Refresh, Residual, Rule, Stack
from eckart.adapters.federation.server import Account, Federation, InProcess, Round, Server

__all__ = [
    "Account",
    "Client",
    "Exact",
    "Federation",
    "InProcess",
    "LocalClient",
    "Privacy",
    "Refresh",
    "Reply",
    "Residual",
    "Round",
    "Rule",
    "Server",
    "Stack",
    "Steps",
    "epsilon",
    "noise_for",
]
