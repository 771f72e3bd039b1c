"""Fine-tuning on disk: every task, what lies in the folder, runs that are killed and resumed, and bad input."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import small_examples
import torch
import transformers as tf
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file

import tiny
from eckart import compress_to
from eckart.adapters.layer import AdapterLayer
from eckart.checkpoint.source import resolve
from eckart.runs import Finetuning, finetune
from eckart.runs.base import rows_held_out
from eckart.runs.judge import judge
from eckart.runs.prepare import prepare
from eckart.runs.record import read_metrics


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits


def test_text_leaves_an_adapter_its_tokenizer_its_metrics_and_a_record(tmp_path: Path) -> None:
    done = small_examples.tuned(tmp_path, "text", settings={"rank": 8}, steps=30, lr=0.1)
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "metrics.jsonl", "finetune.json"
    }  # fmt: skip
    assert {p.name for p in tmp_path.iterdir()} == {"llama", "text.jsonl", "out"}
    assert done.task == "text"
    assert done.labels is None
    assert done.trained == 21 * 8
    assert done.bytes == (out / "adapter_model.safetensors").stat().st_size
    assert done.before is not None
    assert done.after is not None
    assert done.after["loss"] < 0.95 * done.before["loss"]
    assert done.notes == ["the task is text, guessed from the columns text"]
    assert [line["step"] for line in read_metrics(out)] == list(range(1, 31))
    record = tiny.read_json(out / "finetune.json")
    assert record["settings"]["settings"] == {"rank": 8}
    assert record["result"]["trained"] == done.trained
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    alone = logits(base, [5, 6, 7])
    adapted = PeftModel.from_pretrained(base, out)
    assert not torch.allclose(logits(adapted, [5, 6, 7]), alone)
    assert tf.AutoTokenizer.from_pretrained(out)("w1 w2")["input_ids"] == tiny.tokenizer()("w1 w2")["input_ids"]


@pytest.mark.parametrize(("share", "rows", "held"), [(0.1, 3, 1), (0.1, 24, 2), (0.0, 3, 0), (0.99, 10, 10)])
def test_of_few_rows_one_is_held_out(share: float, rows: int, held: int) -> None:
    assert rows_held_out(share, rows) == held


def test_the_held_out_loss_is_that_of_the_saved_adapter(tmp_path: Path) -> None:
    done = small_examples.tuned(tmp_path, "text", held_out=0.2)
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = [i for row in small_examples.rows("text") for i in tokenizer(row["text"])["input_ids"]]
    windows = torch.tensor(ids).split(16)
    held = torch.stack(windows[-round(0.2 * len(windows)) :])
    with torch.no_grad():
        found = adapted(input_ids=held, labels=held).loss
    assert done.after is not None
    assert float(found) == pytest.approx(done.after["loss"], rel=1e-5)


@pytest.mark.parametrize("task", ["instruction", "messages"])
def test_of_an_instruction_only_the_response_is_learned(tmp_path: Path, task: str) -> None:
    if task == "messages":
        tokenizer = tf.AutoTokenizer.from_pretrained(small_examples.model(tmp_path / "llama"))
        tokenizer.chat_template = small_examples.TEMPLATE
        tokenizer.save_pretrained(tmp_path / "llama")
    done = small_examples.tuned(tmp_path, task, steps=40, lr=0.1, batch_size=16)
    assert done.task == "instruction"
    assert done.before is not None
    assert done.after is not None
    assert done.after["loss"] < done.before["loss"]


@pytest.mark.parametrize("base", ["llama", "gpt2", "bert", "mpnet"])
def test_classes_are_learned_by_decoders_and_encoders(tmp_path: Path, base: str) -> None:
    done = small_examples.tuned(tmp_path, "classification", base=base, steps=40, batch_size=12, lr=3e-2)
    assert done.labels == ["high", "low"]
    assert done.before is not None
    assert done.after is not None
    assert done.after["accuracy"] >= max(0.75, done.before["accuracy"])
    again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=2, dtype=torch.float32)
    saved = load_file(tmp_path / "out/adapter_model.safetensors")
    head = [name for name in saved if "updates" not in name]
    assert any("score" in name or "classifier" in name for name in head)
    assert ("pooler" in " ".join(head)) == (base == "bert"), "what the folder lacked is trained and saved"
    job = Finetuning(str(tmp_path / base), "svfit", str(tmp_path / "classification.jsonl"), "", length=16)
    tokenizer, data = prepare(job, resolve(tmp_path / base))
    again.config.pad_token_id = tokenizer.pad_token_id
    assert data.held is not None
    assert judge(again, data.held, 12).to_json() == pytest.approx(done.after)


def test_a_folder_that_was_compressed_is_a_base_for_every_task(tmp_path: Path) -> None:
    small_examples.model(tmp_path / "llama")
    compress_to(tmp_path / "small", tmp_path / "llama", "svd", budget=0.8)
    for task in ("text", "classification"):
        small_examples.write(tmp_path / f"{task}.jsonl", task)
        done = finetune(
            tmp_path / "small", "svfit", tmp_path / f"{task}.jsonl", tmp_path / task, settings={"rank": 3},
            **small_examples.SHORT,
        )  # fmt: skip
        assert done.trained >= 21 * 3
        assert done.after is not None
    again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "classification", num_labels=2)
    hosts = {type(m.host.module).__name__ for m in again.modules() if isinstance(m, AdapterLayer)}
    assert hosts == {"FactoredLinear"}


def test_half_precision_halves_the_frozen_model_and_trains_in_float32(tmp_path: Path) -> None:
    small_examples.tuned(tmp_path, "classification", precision="bfloat16", base="bert")
    assert {t.dtype for t in load_file(tmp_path / "out/adapter_model.safetensors").values()} == {torch.float32}
    half = read_metrics(tmp_path / "out")[0]["weight_bytes"]
    small_examples.tuned(tmp_path, "classification", out="whole", base="bert")
    assert half < 0.75 * read_metrics(tmp_path / "whole")[0]["weight_bytes"]


def test_epochs_and_accumulation_decide_the_number_of_steps(tmp_path: Path) -> None:
    done = small_examples.tuned(tmp_path, "instruction", steps=None, epochs=2, batch_size=3, accumulate=2, warmup=0.1)
    assert done.rows == 36
    assert done.steps == 12


CUT: dict[str, dict[str, Any]] = {
    "text": {"adapter": "s2_lora"},
    "classification": {"adapter": "svfit", "base": "bert"},
}


@pytest.mark.parametrize("task", [pytest.param(t, marks=[pytest.mark.slow] * bool(i)) for i, t in enumerate(CUT)])
def test_killed_at_any_change_of_a_file_and_resumed_it_ends_with_the_same_bits(task: str, tmp_path: Path) -> None:
    words = CUT[task]
    base, data = words.get("base", "llama"), small_examples.write(tmp_path / f"{task}.jsonl", task)
    small_examples.model(tmp_path / base, base, attention_dropout=0.2)
    command = [
        "finetune", tmp_path / base, "--adapter", words["adapter"], "--data", data, "--set", "rank=4", "--set",
        "dropout=0.1", "--steps", 8, "--batch-size", 4, "--length", 16, "--lr", 0.01, "--save-every", 3, "--json",
    ]  # fmt: skip
    done = tiny.run_forked([*command, "--output", tmp_path / "untouched"], tmp_path)
    assert done.code == 0, done.printed
    command += ["--output", tmp_path / "out"]
    had_begun = []
    for attempt, part in enumerate((3, 6)):
        at = done.steps * part // 10
        killed = tiny.run_forked([*command, *(["--resume"] if attempt else [])], tmp_path, at)
        assert killed.code == -signal.SIGKILL, killed.printed
        assert not (tmp_path / "out").exists()
        had_begun.append((tmp_path / "out.partial" / "state.pt").exists())
    assert any(had_begun)
    refused = tiny.run_forked(command, tmp_path)
    assert refused.code == 4
    assert "--resume" in json.loads(refused.printed)["error"]
    finished = tiny.run_forked([*command, "--resume"], tmp_path)
    assert finished.code == 0, finished.printed
    files = [tiny.hashes(tmp_path / name) for name in ("out", "untouched")]
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json"):
        assert files[0][name] == files[1][name]
    results = [json.loads(r.printed) for r in (finished, done)]
    for name in ("before", "after", "loss", "trained"):
        assert results[0][name] == results[1][name]
    assert not (tmp_path / "out.partial").exists()


def test_a_checkpoint_holds_what_is_trained_and_not_the_model(tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("train", 5):
            signal.raise_signal(signal.SIGINT)

    small_examples.tuned(tmp_path, "text", out="whole")
    with pytest.raises(KeyboardInterrupt, match="after step 5 of 8"):
        small_examples.tuned(tmp_path, "text", progress=interrupt)
    state = torch.load(tmp_path / "out.partial/state.pt", weights_only=True)
    assert state["steps"] == 5
    assert all("svfit" in name or "updates" in name for name in state["model"])
    begun: list[int] = []
    small_examples.tuned(tmp_path, "text", resume=True, progress=lambda stage, done, _: begun.append(done) if stage == "train" else None)  # fmt: skip # noqa: E501
    assert begun == [5, 6, 7, 8]
    whole, out = (tiny.hashes(tmp_path / name)["adapter_model.safetensors"] for name in ("whole", "out"))
    assert whole == out


def test_the_seed_decides_every_bit(tmp_path: Path) -> None:
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        small_examples.tuned(tmp_path, "classification", out=out, seed=seed, adapter="s2_lora")
    a, b, c = (tiny.hashes(tmp_path / name)["adapter_model.safetensors"] for name in "abc")
    assert a == b != c


def test_what_does_not_do_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    def tuned(kind: str = "text", /, **words: Any) -> None:
        small_examples.tuned(tmp_path, kind, **words)

    for words, message in (
        ({"adapter": "svfitt"}, "unknown method 'svfitt'; did you mean 'svfit'"),
        ({"adapter": "galore"}, "'galore' is one of eckart.optimizers"),
        ({"settings": {"rnk": 4}}, "svfit has no setting 'rnk'; did you mean 'rank'"),
        ({"settings": {"rank": 0}}, r"svfit\(rank=0\): it is a whole number, at least 1"),
        ({"settings": {"rank": 33}}, r"model\.layers\.0\.self_attn\.\w+: rank 33 is more than a matrix of shape"),
        ({"settings": {"target_modules": ["q_prj"]}}, r"target_modules=\['q_prj'\] match no layer.*'q_proj'"),
        ({"task": "classification"}, "has the columns text; the task classification needs text and label"),
        ({"task": "chat"}, "task: 'chat' is not one of auto, text, instruction, classification"),
        ({"columns": {"text": "txt"}}, "has no column 'txt'; did you mean 'text'"),
        ({"columns": {"text": "text"}, "length": 65}, "length: 65 is more than the 64 positions"),
        ({"held_out": 0.999}, "of [0-9]+ windows of .* would be held out: give more data"),
        ({"held_out": 1.5}, "held_out: 1.5 is not a share"),
        ({"steps": 0}, "steps: 0 is too small"),
        ({"stepz": 3}, "has no setting 'stepz'; did you mean 'steps'"),
        ({"device": "cuda"}, "torch sees no GPU here"),
        ({"base": "bert"}, "is a BertForMaskedLM, which does not foretell next words"),
        ({"out": "llama"}, "is the folder of the model itself"),
    ):
        if words.get("device") == "cuda" and torch.cuda.is_available():
            continue
        try:
            tuned(**words)
        except ValueError as e:
            assert re.search(message, str(e)), str(e)  # noqa: PT017
        else:
            pytest.fail(f"{words} was not refused")
        assert not (tmp_path / "out.partial").exists(), message
        assert not (tmp_path / "out").exists()
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty: there is not one row in it"):
        tuned("empty")
    with pytest.raises(RuntimeError, match=r"training has diverged; lower .* --lr"):
        tuned(lr=1e30, clip=0.0, warmup=0)
