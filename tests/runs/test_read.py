"""Settings from YAML: what is read, and what every mistake is told."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest
import small_runs

import eckart.runs
import tiny
from eckart.forms.layers import FactoredLinear
from eckart.runs import Config, read_yaml
from eckart.runs.build import check_words, model_for, new_model, optimizer_for, structured, tokenizer_for


def read(tmp_path: Path, text: str) -> Config:
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    return read_yaml(tmp_path / "c.yaml", Config)


def test_defaults_sections_and_further_settings(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        "output: x\ntraining: {steps: 5, warmup: 0.4, clip: 2}\nmodel: {type: gpt2, n_embd: 8}\n"
        "optimizer: {name: galore, lr: 1e-2, rank: 4, scale: 1}\nstructure: {method: sltrain, rank: 8}\n"
        "data: {texts: [a.txt, b.txt]}\n",
    )
    assert (config.training.steps, config.training.warmup, config.training.clip) == (5, 0.4, 2.0)
    assert (config.optimizer.lr, config.optimizer.rank, config.optimizer.settings) == (0.01, 4, {"scale": 1})
    assert config.structure is not None
    assert config.structure.settings == {"rank": 8}
    assert config.model.settings == {"n_embd": 8}
    assert config.data.texts == ("a.txt", "b.txt")
    assert read(tmp_path, "output: x").data.texts == ("builtin",)
    assert config.to_json()["optimizer"]["settings"] == {"scale": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "": "the key 'output' is missing: add it",
        "- 1": r"the file holds \[1\], where keys and values belong",
        "output: x\nouptut: y": "unknown key 'ouptut'; did you mean 'output'",
        "output: x\ntraining: {stepz: 3}": "unknown key 'training.stepz'; did you mean 'steps'",
        "output: x\ntraining: {steps: many}": "training.steps: 'many' is not a whole number",
        "output: x\ntraining: {steps: true}": "training.steps: True is not a whole number",
        "output: x\ntraining: {steps: 0}": "training.steps: 0 is too small, it is at least 1",
        "output: x\ntraining: {warmup: 1.5}": "training.warmup=1.5: give a step",
        "output: x\ntraining: {warmup: 2000}": "training.warmup: 2000 is more than the run has steps, 1000",
        "output: x\ntraining: {decay: cosinus}": "training.decay: 'cosinus' is not one of cosine, linear, none",
        "output: x\ntraining: {floor: 2}": "training.floor: 2.0 is not a share",
        "output: x\ntraining: {clip: -1}": "training.clip: -1.0 is not a norm",
        "output: x\ntraining: [1]": r"training holds \[1\], where keys and values belong",
        "output: x\ndata: {held_out: 1}": "data.held_out: 1.0 is not a share",
        "output: x\ndata: {texts: []}": "data.texts is an empty list",
        "output: x\ndata: {length: 1}": "data.length: 1 is too small",
        "output: x\noptimizer: {lr: 0}": "optimizer.lr: 0.0 is not a learning rate",
        "output: x\noptimizer: {lr: fast}": "optimizer.lr: 'fast' is not a number",
        "output: x\noptimizer: {rank: 4, density: 0.1}": "say the same",
        "output: x\noptimizer: {include: a}": "give a rank or a density, too",
        "output: x\noptimizer: {int8: true}": "optimizer.int8 is for q_galore",
        "output: x\noptimizer: {betas: {a: 1}}": "optimizer.betas: .* is not a number, text, or a list of them",
        "output: x\nmodel: {folder: m, hidden_size: 3}": "model.hidden_size is of a new model",
        "output: x\nstructure: {layers: a}": "give a method of structured training or a form",
        "output: x\noutput: y": "the key 'output' is given twice",
        "output: [": "is not YAML",
    }.items(),
)
def test_mistakes_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"c\.yaml:? .*{message}"):
        read(tmp_path, text)


def test_the_example_of_the_room_is_a_run(tmp_path: Path) -> None:
    example = (eckart.runs.__doc__ or "").split("\n\n")[1]
    config = read(tmp_path, textwrap.dedent(example))
    check_words(config)
    model = new_model(config.model, tiny.tokenizer(), 16, seed=0)
    schedule = structured(model, config)
    assert schedule is not None
    optimizer = optimizer_for(model, config.optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 6 * 4
    assert sum(isinstance(m, FactoredLinear) for m in model.modules()) == 6 * 3


def test_files_that_are_no_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*nothing\.yaml"):
        read_yaml(tmp_path / "nothing.yaml", Config)
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_yaml(tmp_path / "c.yaml", Config)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optimizer": {"name": "galor"}}, "unknown optimiser 'galor'; did you mean 'galore'"),
        ({"optimizer": {"name": "l_greco"}}, "it is no optimiser but works beside one"),
        ({"structure": {"method": "sltrian"}}, "structure.method: unknown method 'sltrian'; did you mean 'sltrain'"),
        (
            {"structure": {"method": "sltrain", "rnk": 2}},
            "structure.rnk: sltrain has no such setting; did you mean 'rank'",
        ),
        ({"optimizer": {"beta": 1}}, "optimizer.beta: adamw has no such setting; did you mean 'betas'"),
        ({"optimizer": {"rank": 2}}, "adamw projects nothing"),
        ({"optimizer": {"name": "galore", "rank": 2, "side": "up"}}, "optimizer: a projector's side is one of"),
        ({"optimizer": {"name": "galore", "rank": 2, "include": "nothing"}}, "optimizer: no weight of"),
        ({"model": {"type": "lama"}}, "model.type: transformers knows no 'lama'; did you mean"),
        ({"model": {"hiden_size": 3}}, "model.hiden_size: llama has no such setting; did you mean 'hidden_size'"),
        ({"model": {"vocab_size": 3}}, "model.vocab_size: 3 is less than the tokenizer's"),
        ({"model": {"num_attention_heads": 3}}, "model: transformers cannot make this llama"),
    ],
)
def test_words_that_do_not_go_together_are_named(sections: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = read_yaml(small_runs.write(tmp_path, **sections), Config)
    with pytest.raises(ValueError, match=message):
        built(config, tmp_path)


def built(config: Config, folder: Path) -> None:
    """Model and optimiser of these settings, as a run makes them."""
    check_words(config)
    model = model_for(config, tokenizer_for(config, [], folder / "kept"))
    optimizer_for(model, config.optimizer)
