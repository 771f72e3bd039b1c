"""Where in a model a method finds things."""

from __future__ import annotations

from eckart.jobs.method import part_of


def test_a_block_is_found_by_whole_names() -> None:
    blocks = [f"layers.{i}" for i in range(12)]
    assert [part_of(f"layers.{i}.q", blocks) for i in (1, 11)] == [1, 11]
    assert part_of("layers.1", blocks) == 1
    assert part_of("layers", blocks) == part_of("head", blocks) == -1
