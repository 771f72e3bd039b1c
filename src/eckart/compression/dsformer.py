"""Small dictionaries for blocks of inputs, with sparse codes."""

from __future__ import annotations

from dataclasses import dataclass, field

from eckart.forms import Form
from eckart.forms.block_dictionary import BlockDictionary
from eckart.jobs.recipe import Recipe
from eckart.registry import method


@method("dsformer", family="dictionary", paper="DSFormer: Effective Compression of Text-Transformers by Dense-Sparse Weight Factorization, Chand et al., EACL 2024, arXiv 2312.13211")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class DSFormer(Recipe):
    """Every block of inputs W_j as S_j D_j, rows of S_j with equally many entries (section 3).

    This is the paper's start, which knows nothing of the task: pursuit and K-SVD in the Frobenius norm. Its
    straight-through training, which moves supports by the gradients of a latent dense weight, belongs to training, and
    is not done here.
    """

    form: Form = field(default_factory=BlockDictionary)
