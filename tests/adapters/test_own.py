"""An adapter from outside the package, as docs/adapters.md shows it."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from eckart import adapters, registry
from eckart.testing.adapters import answers, small_model, trained

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that the page's last block of code makes."""
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[-1]
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    module = types.ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    return module


def test_the_page_s_adapter_works_by_its_key(scale: Any, tmp_path: Path) -> None:
    plain = answers(small_model())
    model = adapters.adapt(small_model(), "scale", target_modules=["q_proj"]).eval()
    assert torch.equal(answers(model), plain)
    found = answers(trained(model))
    assert not torch.equal(found, plain)
    model.merge_adapter()
    torch.testing.assert_close(answers(model), found)
    assert registry.find("scale").wing == "adapters"


def test_a_method_of_no_wing_is_refused() -> None:
    cls = type("Mine", (), {"__module__": "somewhere"})
    with pytest.raises(ValueError, match="belongs to no wing"):
        registry.method("mine", family="x", paper="none")(cls)
