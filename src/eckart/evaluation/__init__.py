"""Evaluation: quality, size and speed of a model, measured."""

from eckart.evaluation.agreement import Agreement, agreement
from eckart.evaluation.evaluate import Evaluation, evaluate
from eckart.evaluation.heldout import heldout_tokens
from eckart.evaluation.lm_eval import run_lm_eval
from eckart.evaluation.memory import PeakMemory, model_bytes
from eckart.evaluation.perplexity import Perplexity, perplexity
from eckart.evaluation.speed import Machine, Speed, speed

__all__ = [
    "Agreement",
    "Evaluation",
    "Machine",
    "PeakMemory",
    "Perplexity",
    "Speed",
    "agreement",
    "evaluate",
    "heldout_tokens",
    "model_bytes",
    "perplexity",
    "run_lm_eval",
    "speed",
]
