"""Residual stores: what is remembered of the entries that a head evicts."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from learnkv.core.component import Component
from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms

Parts = Mapping[str, Tensor]
"""Stored tensors [B, H, …] by name."""


class ResidualStore(Component, ABC):
    """A summary of a head's evicted entries, of fixed size, that takes part in attention beside the kept ones."""

    @abstractmethod
    def summarise(self, keys: Tensor, values: Tensor, weights: Tensor) -> Parts:
        """Summary of entries [B, H, S, D], float32 and differentiable in the weights.

        Args:
            weights: [B, H, S] 1 for evicted entries, 0 for others.
        """

    @abstractmethod
    def merged(self, first: Parts, second: Parts) -> Parts:
        """Summary of the entries of both."""

    @abstractmethod
    def attend(
        self, query: Tensor, parts: Parts, scaling: float, terms: SoftmaxTerms = NO_TERMS
    ) -> tuple[Tensor, Tensor]:
        """Estimated attention [B, H*G, T, D] to the evicted entries alone, and its log-sum-exp [B, H*G, T], float32.

        Args:
            query: [B, H*G, T, D].
            scaling: factor on query-key products.
            terms: soft cap of their logits; sinks belong to the kept entries.
        """

    @abstractmethod
    def rounded(self, parts: Parts) -> Parts:
        """The parts as they are stored. Raises UserError for numbers beyond what can be stored."""

    @abstractmethod
    def nbytes(self, head_dim: int) -> int:
        """Bytes of one head's parts as they are stored."""
