"""Every registered form, alone and within sums and products, passes the battery that ships with the package."""

from __future__ import annotations

from eckart.forms import parse
from eckart.testing import FormContract, composed_forms, registered_forms
from eckart.testing.forms import Case

DEEP = [
    "dense(width=4) @ diagonal() @ dense()",
    "diagonal() @ low_rank(rank=3) @ diagonal()",
    "low_rank(rank=2) @ dense(width=7) + diagonal()",
]


class TestForms(FormContract):
    def forms(self) -> list[Case]:
        deep: list[Case] = [(parse(text), (12, 10)) for text in DEEP]
        return registered_forms() + composed_forms() + deep
