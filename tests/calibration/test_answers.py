"""What models answer: divergences are torch's own, draws have the right curvature, predictions hold for every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

import eckart
import tiny
from eckart.calibration.answers import Answer
from eckart.calibration.calibrate import Request, calibrate
from eckart.calibration.store import StatisticsStore
from eckart.calibration.stream import Batch, Stream
from eckart.calibration.subject import InMemory
from eckart.forms import drop_in
from eckart.forms.layers import matrix_of
from eckart.jobs import Recipe
from eckart.metrics import Kronecker

ROWS = 48


def whisper() -> Any:
    torch.manual_seed(0)
    config = tf.WhisperConfig(
        vocab_size=64, num_mel_bins=4, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=8,
        max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return tiny.scattered(tf.WhisperForConditionalGeneration(config).eval())


def resnet() -> Any:
    torch.manual_seed(0)
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=5)
    return tf.ResNetForImageClassification(config).eval()


def images(size: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(8, 3, size, size, generator=generator)} for _ in range(ROWS // 8)]


def speech() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_features": torch.randn(4, 4, 16, generator=generator),
         "decoder_input_ids": torch.randint(3, 64, (4, 7), generator=generator)}
        for _ in range(ROWS // 4)
    ]  # fmt: skip


def text() -> list[Batch]:
    return tiny.batches((4,) * (ROWS // 4), length=8)


KINDS: dict[str, tuple[Any, Any]] = {
    "decoder": (lambda: tiny.build("llama"), text),
    "masked": (lambda: tiny.build("bert"), text),
    "features": (lambda: tiny.build("bert").bert, text),
    "images": (lambda: tiny.build("vit"), lambda: images(12)),
    "patches": (lambda: tiny.build("vit").vit, lambda: images(12)),
    "speech": (whisper, speech),
    "convolutions": (resnet, lambda: images(16)),
}


@torch.no_grad()
def answers(model: nn.Module, batches: list[Batch]) -> list[Answer]:
    return [Answer.of(model, model(**batch), batch) for batch in batches]


@pytest.mark.parametrize("kind", ["decoder", "features"])
def test_the_divergence_is_that_of_the_distributions(kind: str) -> None:
    make, _ = KINDS[kind]
    batch = tiny.batches(padded=True)[0]
    found, wanted = (answers(m, [batch])[0] for m in (make(), tiny.build("llama" if kind == "decoder" else "bert", 1)))
    if kind == "decoder":
        expected = F.kl_div(found.values.log_softmax(-1), wanted.values.log_softmax(-1), reduction="none", log_target=True).sum(-1)  # fmt: skip # noqa: E501
    else:
        wanted = answers(tiny.build("bert", 1).bert, [batch])[0]
        spread = wanted.values.norm(dim=-1, keepdim=True)
        normal = torch.distributions.Normal
        expected = torch.distributions.kl_divergence(normal(wanted.values, spread), normal(found.values, spread)).sum(-1)  # fmt: skip # noqa: E501
    torch.testing.assert_close(found.divergence(wanted), expected)
    assert not found.divergence(found).any()
    assert torch.equal(found.real, batch["attention_mask"].bool())


@pytest.mark.parametrize("words", [True, False])
def test_drawn_losses_have_the_curvature_of_the_divergence(words: bool) -> None:
    """E[g gᵀ] is the Fisher matrix: diag(p) - p pᵀ of logits, the identity over the squared length of features."""
    values = torch.tensor([1.0, -0.5, 0.3, 2.0]).expand(20000, 4).clone().requires_grad_(True)
    answer = Answer(values, words, None, torch.ones(20000, dtype=torch.bool))
    losses, _ = answer.drawn_losses(torch.Generator().manual_seed(0))
    (g,) = torch.autograd.grad(losses.sum(), values)
    p = values[0].detach().softmax(-1)
    fisher = p.diag() - p.outer(p) if words else torch.eye(4) / values[0].detach().square().sum()
    torch.testing.assert_close(g.T @ g / len(g), fisher, atol=0.05 * float(fisher.max()), rtol=0)


def test_only_models_that_foretell_words_have_a_loss() -> None:
    for kind, (make, data) in KINDS.items():
        answer = answers(make(), data()[:1])[0]
        assert (answer.next_words is not None) == (kind in ("decoder", "speech")), kind
        if answer.next_words is None:
            with pytest.raises(ValueError, match="foretells no next words"):
                answer.losses()


def classifier(*more: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), *more)


@pytest.mark.parametrize(
    ("model", "words"),
    [(classifier(), True), (classifier(nn.ReLU()), True), (classifier(nn.LayerNorm(5)), False),
     (classifier(nn.Linear(5, 1)), False), (nn.Sequential(classifier(), nn.Flatten(0)), False)],
    ids=["head", "and no weights after it", "norm", "one class", "another width"],
)  # fmt: skip
def test_a_tensor_is_logits_where_the_last_layer_puts_it_out(model: nn.Module, words: bool) -> None:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    assert Answer.of(model, model(x), {}).words == words


def test_a_compressed_head_still_puts_out_logits() -> None:
    model, x = classifier(), torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    head = model.get_submodule("2")
    matrix = eckart.fit("low_rank(rank=2)", matrix_of(head).detach(), "plain()")
    model.set_submodule("2", drop_in(head, matrix, head.bias.detach()))
    assert Answer.of(model, model(x), {}).words


def test_one_logit_is_no_distribution() -> None:
    model = tf.BertForSequenceClassification(tf.BertConfig(**{**tiny.build("bert").config.to_diff_dict(), "num_labels": 1}))  # fmt: skip # noqa: E501
    answer, moved = (Answer.of(model, model(**batch), batch) for batch in tiny.batches()[:2])
    assert not answer.words
    assert (moved.divergence(answer) > 0).all()


def test_what_has_no_answer_is_named() -> None:
    with pytest.raises(ValueError, match="Linear puts out neither logits nor a last hidden state"):
        Answer.of(nn.Linear(2, 2), {}, {})


@pytest.mark.parametrize("kind", KINDS)
def test_kronecker_predicts_how_far_answers_move(kind: str, tmp_path: Path) -> None:
    """Half the squares of small errors of all layers, to within a factor, for every kind of model."""
    make, data = KINDS[kind]
    model, batches = make(), data()
    stream = Stream(InMemory(model), batches, tmp_path)
    stream.start()
    sites = Recipe().sites(model, stream.blocks)
    store = StatisticsStore(tmp_path / "statistics")
    request = Request(sites, Kronecker.needs, labels="model", gradient_samples=ROWS)
    calibrate(stream, request, store, seed=0, progress=lambda *_: None)
    before = answers(model, batches)
    generator = torch.Generator().manual_seed(2)
    predicted = 0.0
    for part, names in sites.items():
        for name in names:
            layer = model.get_submodule(name)
            matrix = matrix_of(layer).detach()
            delta = 1e-3 * matrix.std() * torch.randn(matrix.shape, generator=generator)
            predicted += Kronecker(centred=False).weighting(store.of(name, part), name).norm2(delta) / 2
            layer.weight.data += delta.reshape(layer.weight.shape)
    after = answers(model, batches)
    moved = [a.divergence(b)[a.real] for a, b in zip(after, before, strict=True)]
    measured = float(torch.cat(moved).double().mean())
    assert 0.5 < measured / predicted < 2, (measured, predicted)


def test_an_encoder_and_a_decoder_are_treated_together(tmp_path: Path) -> None:
    """A model that is no chain is run whole: both towers, and not the head, which is the table."""
    sites = Recipe().sites(whisper(), [])
    (names,) = sites.values()
    assert {n.split(".")[1] for n in names} == {"encoder", "decoder"}
    assert not any("proj_out" in n or "embed" in n for n in names)
    assert Stream(InMemory(whisper()), speech(), tmp_path).blocks == []
