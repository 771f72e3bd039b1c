"""Agreement with the original is torch's own divergence of whole logits."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers

from eckart.calibration.tokens import Tokens
from eckart.evaluation import logits as logits_module
from eckart.evaluation.agreement import agreement, divergence
from eckart.evaluation.logits import predicted
from eckart.evaluation.perplexity import perplexity

Make = Callable[..., transformers.LlamaForCausalLM]


def disturbed(model: transformers.LlamaForCausalLM, size: float) -> transformers.LlamaForCausalLM:
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("chunk", [150, 2**23])
def test_it_is_torchs_divergence(llama: Make, windows: Tokens, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits_module, "CHUNK", chunk)
    original = llama()
    compressed = disturbed(original, 0.05)
    keep = predicted(windows.mask)
    with torch.no_grad():
        p, q = (
            copy.deepcopy(m).double()(**windows.inputs()).logits[:, :-1][keep].log_softmax(-1)
            for m in (original, compressed)
        )
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    found = agreement(original, compressed, windows, 2)
    assert found.tokens == 31
    assert found.kl == pytest.approx(float(expected), rel=1e-4)
    assert found.top1 == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert 0.1 < found.top1 < 1
    assert found.original.nll == pytest.approx(perplexity(original, windows).nll, rel=1e-6)
    assert found.compressed.nll == pytest.approx(perplexity(compressed, windows).nll, rel=1e-6)
    assert found.compressed.stderr == pytest.approx(perplexity(compressed, windows).stderr, rel=1e-5)


def test_a_model_agrees_with_itself(llama: Make, windows: Tokens) -> None:
    model = llama()
    found = agreement(model, model, windows)
    assert (found.kl, found.top1) == (0.0, 1.0)
    assert found.original == found.compressed


def test_padding_counts_for_nothing(llama: Make, windows: Tokens) -> None:
    original = llama()
    compressed = disturbed(original, 0.05)
    other = Tokens(torch.where(windows.mask, windows.ids, 7), windows.mask)
    assert agreement(original, compressed, other) == agreement(original, compressed, windows)


def test_the_divergence_grows_with_the_disturbance(llama: Make, windows: Tokens) -> None:
    model = llama()
    kl = [agreement(model, disturbed(model, size), windows).kl for size in (0.001, 0.01, 0.1)]
    assert 0 < kl[0] < kl[1] < kl[2]


def test_what_the_original_excludes_costs_nothing() -> None:
    logp = torch.tensor([[0.5, 0.5, 0.0]]).log()
    logq = torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert float(divergence(logp, logq)) == pytest.approx(0.5 * float(torch.tensor(2.0).log()))


def test_models_of_different_vocabularies(llama: Make, windows: Tokens) -> None:
    with pytest.raises(ValueError, match="vocabularies have 50 and 51 tokens"):
        agreement(llama(), llama(vocab_size=51), windows)


def test_progress(llama: Make, windows: Tokens) -> None:
    steps: list[tuple[str, int, int]] = []
    agreement(llama(), llama(), windows, 4, progress=lambda *step: steps.append(step))
    assert steps == [("agreement", 1, 2), ("agreement", 2, 2)]
