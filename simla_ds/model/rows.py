"""Rows without their padding: the tokens of several rows one after the other, and attention among them.

R rows of L slots each, of which T are kept; H heads, d head size. Everything but attention works token by token, so
only attention needs to know where a row ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from simla_kernels import cross_attention, cross_attention_varlen


@dataclass(frozen=True)
class Rows:
    """Which slots of R rows are kept, and which of those may be attended to. All of it is known without a sync."""

    count: int
    """R."""
    width: int
    """L, slots of a row."""
    index: Tensor | None = None
    """(T,) int64 ascending: the kept ones among the (R * L) slots; None: all are kept."""
    mask: Tensor | None = None
    """(R, L) bool, True at slots that may be attended to (a kept slot may be hidden); None: every kept one. Where rows
    are packed, a row's hidden slots stand behind its visible ones."""
    causal: bool = False
    """Whether a slot sees itself and those before it only, as in a decoder."""

    @classmethod
    def dense(cls, x: Tensor, mask: Tensor | None = None) -> Rows:
        """Return the rows of x (R, L, ...), all slots kept."""
        return cls(x.shape[0], x.shape[1], mask=mask)

    @classmethod
    def of(cls, mask: Tensor, index: Tensor | None = None, *, causal: bool = False) -> Rows:
        """Return the rows of a (R, L) mask, packed by the flat positions of the kept slots, or with all of them."""
        return cls(mask.shape[0], mask.shape[1], index, mask, causal)

    @classmethod
    def join(cls, parts: Sequence[Rows]) -> Rows:
        """Return the rows of all parts, in order. They have one width, and all of them have masks or none has."""
        if len(parts) == 1:
            return parts[0]
        first, count = parts[0], sum(part.count for part in parts)
        device = next((part.index.device for part in parts if part.index is not None), None)
        index = None
        if device is not None:
            kept, before = [], 0
            for part in parts:
                own = part.index if part.index is not None else torch.arange(part.total, device=device)
                kept.append(own + before)
                before += part.count * part.width
            index = torch.cat(kept)
        masks = [part.mask for part in parts if part.mask is not None]
        return cls(count, first.width, index, torch.cat(masks) if masks else None)

    @property
    def total(self) -> int:
        """T."""
        return self.count * self.width if self.index is None else len(self.index)

    def slots(self, flat: Tensor) -> Tensor:
        """Return where kept slots, given as positions in (R * L), stand among the T; same shape, int64."""
        return flat if self.index is None else torch.searchsorted(self.index, flat)

    def first(self, device: torch.device) -> Tensor:
        """Return where the first slot of each row stands, (R,) int64."""
        return self.slots(torch.arange(self.count, device=device) * self.width)

    def bounds(self, device: torch.device) -> Tensor:
        """Return where each row starts among the T, and T: (R + 1,) int64."""
        return self.slots(torch.arange(self.count + 1, device=device) * self.width)

    def positions(self, device: torch.device) -> Tensor:
        """Return where each kept slot stands in its row, (T,) int64."""
        index = torch.arange(self.total, device=device) if self.index is None else self.index
        return index % self.width

    def take(self, slots: Tensor) -> Rows:
        """Return the same rows with nothing but some of the kept slots, (Q,) ascending: those that ask."""
        index = slots if self.index is None else self.index.index_select(0, slots)
        return Rows(self.count, self.width, index, causal=self.causal)

    def pack(self, x: Tensor) -> Tensor:
        """(R, L, ...) to (T, ...)."""
        flat = x.flatten(0, 1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def pad(self, x: Tensor) -> Tensor:
        """(T, ...) to (R, L, ...), zeros at slots that are not kept."""
        if self.index is not None:
            # not index_copy, which keeps x for a backward that only looks at its shape
            x = x.new_zeros(self.count * self.width, *x.shape[1:]).index_put((self.index,), x)
        return x.unflatten(0, (self.count, self.width))


def attend(
    q: Tensor, k: Tensor, v: Tensor, queries: Rows, keys: Rows, key_row: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """Attend row by row: what `queries` keeps asks, what `keys` keeps and does not hide answers.

    The one place that knows how attention of packed rows is computed: by their lengths on a card, padded on a CPU.

    Args:
        q: (Tq, H, d). k, v: (Tk, H, d).
        queries: the Tq tokens' rows. keys: the Tk tokens' rows.
        key_row: (R,) int64 which row of `keys` each row of `queries` reads; None: row r reads row r.
        dropout_p: chance of dropping an attention weight.

    Returns:
        (Tq, H, d).
    """
    if keys.count == 1 and keys.mask is None and not keys.causal:  # all read the same: their own ends do not matter
        out = cross_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), dropout_p=dropout_p)
        assert isinstance(out, Tensor)
        return out[0].transpose(0, 1)
    if len(q) and not keys.causal and _by_length(q.device, queries, keys):
        return _attend_by_length(q, k, v, queries, keys, key_row, dropout_p)
    asked, answering, answer = (rows.pad(x).transpose(1, 2) for rows, x in ((queries, q), (keys, k), (keys, v)))
    if keys.causal:  # answers of a few tokens: the kernel knows no such mask, and nothing would be gained
        visible = torch.ones(keys.width, keys.width, dtype=torch.bool, device=q.device).tril()
        visible = visible if keys.mask is None else visible & keys.mask[:, None, None]
        out = F.scaled_dot_product_attention(asked, answering, answer, visible, dropout_p)
        return queries.pack(out.transpose(1, 2))
    out = cross_attention(asked, answering, answer, keys.mask, key_row, dropout_p)
    assert isinstance(out, Tensor)  # a pair only where the weights are asked for
    return queries.pack(out.transpose(1, 2))


def _by_length(device: torch.device, queries: Rows, keys: Rows) -> bool:
    """Whether rows are packed and the device gains by leaving them so: PyTorch's products on a CPU need them padded."""
    return device.type != "cpu" and not (queries.index is None and keys.index is None)


def _attend_by_length(
    q: Tensor, k: Tensor, v: Tensor, queries: Rows, keys: Rows, key_row: Tensor | None, dropout_p: float
) -> Tensor:
    starts, row = keys.bounds(q.device), key_row
    if keys.mask is not None:  # each row twice: its visible tokens, and the hidden ones behind them, which nobody reads
        visible = starts[:-1] + keys.mask.sum(1)
        starts = torch.cat([torch.stack([starts[:-1], visible], 1).flatten(), starts[-1:]])
        row = 2 * (torch.arange(keys.count, device=q.device) if key_row is None else key_row)
    out = cross_attention_varlen(q, k, v, queries.bounds(q.device), starts, queries.width, keys.width, row, dropout_p)
    assert isinstance(out, Tensor)
    return out


def first_attention(q: Tensor, k: Tensor, rows: Rows) -> Tensor:
    """Return the attention of each row's first token to its row, undropped: (R, H, L) float32, 0 where hidden.

    q is (R, H, d), k is (T, H, d).
    """
    padded = rows.pad(k).transpose(1, 2)
    _, weights = cross_attention(q[:, :, None], padded, padded, rows.mask, return_cls_row=True)
    return weights
