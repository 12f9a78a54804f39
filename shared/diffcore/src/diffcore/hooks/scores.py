"""One attention call written out: P = softmax(scale q kᵀ + mask), some queries at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one `scaled_dot_product_attention`, under its own names.

    `query` is `*b heads queries width`, `key` and `value` are `*b heads keys width`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def num_queries(self) -> int:
        """Length of the query sequence."""
        return self.query.shape[-2]

    def chunks(self, queries: range, most_bytes: int) -> Iterator[range]:
        """Yields runs of queries whose maps take at most so many bytes, but one query at least."""
        width = 8 if self.query.dtype == torch.float64 else 4
        per_query = self.query.shape[:-2].numel() * self.key.shape[-2] * width
        size = max(most_bytes // per_query, 1)
        return (queries[start : start + size] for start in range(0, len(queries), size))

    def probs(self, queries: range) -> Tensor:
        """Returns the map of a run of queries, `*b heads queries keys`, in float32 (float64 for float64)."""
        query = _precise(self.query[..., queries.start : queries.stop, :])
        key = _precise(self._per_head(self.key))
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = (query * scale) @ key.mT
        mask = self._mask(queries)
        if mask is None:
            return scores.softmax(-1)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        # A query that may look nowhere has no distribution; the fused kernels give it zeros.
        return scores.softmax(-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)

    def error(self, queries: range, output: Tensor) -> Tensor:
        """Returns the largest difference between P v and the fused kernel's output for a run of queries."""
        expected = self.probs(queries) @ _precise(self._per_head(self.value))
        return (expected - output[..., queries.start : queries.stop, :]).abs().max()

    def _per_head(self, x: Tensor) -> Tensor:
        # Grouped queries: several heads share one key and one value.
        return x.repeat_interleave(self.query.shape[-3] // x.shape[-3], dim=-3) if self.enable_gqa else x

    def _mask(self, queries: range) -> Tensor | None:
        if self.is_causal:
            places = torch.arange(queries.start, queries.stop, device=self.query.device)
            return places.unsqueeze(1) >= torch.arange(self.key.shape[-2], device=self.query.device)
        mask = self.attn_mask
        if mask is None or mask.ndim < 2 or mask.shape[-2] == 1:
            return mask
        return mask[..., queries.start : queries.stop, :]


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
