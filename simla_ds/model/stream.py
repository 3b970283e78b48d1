"""The single stream: one post-LN BERT that reads text alone, text over image and image over text (SIMLA section 3.1).

R rows, L tokens, D width; T tokens of packed rows. With `shared` every layer has cross-attention and serves all three;
otherwise (ALBEF) the first text_layers read text alone and fusion_layers with cross-attention follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simla_ds.config import StreamConfig, VocabularyConfig
from simla_ds.model.gelu_linear import GeluLinear
from simla_ds.model.layer_norm import ResidualLayerNorm, layer_norm
from simla_ds.model.positions import resample
from simla_ds.model.rows import Rows, attend, first_attention

LAYER_NORM_EPS = 1e-12


class Embeddings(nn.Module):
    """Words, or rows that are vectors already, plus positions; then LayerNorm and dropout."""

    def __init__(self, config: StreamConfig, vocabulary: VocabularyConfig, trained_patches: int):
        super().__init__()
        self.word = nn.Embedding(vocabulary.size, config.width, padding_idx=vocabulary.pad)
        self.position = nn.Embedding(config.max_positions, config.width)
        self.token_type = nn.Embedding(2, config.width) if config.token_types else None
        self.norm = layer_norm(config.width, LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.trained_patches = trained_patches

    def forward(self, rows: Tensor, positions: Tensor | None = None) -> Tensor:
        """Embed (R, L) int64 word ids, or (R, N, D) image rows, which get text positions. Returns (R, L or N, D).

        Packed word ids (T,) come with their positions (T,) and give (T, D).
        """
        if rows.is_floating_point():
            x = rows + self._image_positions(rows.shape[1])
        else:
            positions = torch.arange(rows.shape[1], device=rows.device) if positions is None else positions
            x = self.word(rows) + self.position(positions)
        if self.token_type is not None:
            x = x + self.token_type(torch.zeros(1, dtype=torch.long, device=rows.device))
        return self.dropout(self.norm(x))

    def _image_positions(self, length: int) -> Tensor:
        """Return (length, D); at another resolution than the trained one its patch rows are resampled as a grid."""
        # through the module's forward and not its weight: under ZeRO-3 only a forward gathers it
        device = self.position.weight.device
        table = self.position(torch.arange(self.trained_patches + 1, device=device))
        return resample(table, length - 1)


class Attention(nn.Module):
    """Multi-head attention of packed rows, with residual and LayerNorm."""

    def __init__(self, config: StreamConfig):
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.output = nn.Linear(config.width, config.width)
        self.norm = ResidualLayerNorm(config.width, LAYER_NORM_EPS, config.dropout)

    def forward(self, x: Tensor, source: Tensor, queries: Rows, keys: Rows, key_row: Tensor | None = None) -> Tensor:
        """Return the new tokens (Tq, D) of x (Tq, D), which stand in `queries` and read source (Tk, D) in `keys`.

        Row r reads row key_row[r], or r; a row of the source is projected once however many rows read it.
        """
        q, k, v = (self._split(layer(t)) for layer, t in ((self.query, x), (self.key, source), (self.value, source)))
        out = attend(q, k, v, queries, keys, key_row, self.norm.dropout if self.training else 0.0)
        return self.norm(self.output(out.flatten(1)), x)

    def of_first(self, x: Tensor, rows: Rows) -> Tensor:
        """Return the self-attention of each row's first token, undropped, (R, H, L) float32; x is (T, D)."""
        first = x.index_select(0, rows.first(x.device))
        return first_attention(self._split(self.query(first)), self._split(self.key(x)), rows)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


class FeedForward(nn.Module):
    """Two linear layers around an erf GELU, with residual and LayerNorm."""

    def __init__(self, config: StreamConfig):
        super().__init__()
        self.up = nn.Linear(config.width, config.intermediate_size)
        self.down = GeluLinear(config.intermediate_size, config.width)
        self.norm = ResidualLayerNorm(config.width, LAYER_NORM_EPS, config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.norm(self.down(self.up(x)), x)


class StreamLayer(nn.Module):
    """Self-attention, cross-attention when there is a context, feed-forward."""

    def __init__(self, config: StreamConfig, *, fuses: bool):
        super().__init__()
        self.self_attention = Attention(config)
        self.cross_attention = Attention(config) if fuses else None
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        rows: Rows,
        context: Tensor | None,
        context_rows: Rows | None,
        context_index: Tensor | None,
        read: Tensor | None = None,
        *,
        attention_of_first: bool = False,
    ) -> Tensor:
        """Return the new tokens (T, D), or only those at the slots `read` (Q,): (Q, D).

        With attention_of_first nothing but the self-attention of each row's first token, (R, H, L) float32. It is here
        because only a layer's forward may read its weights (Network.layers).

        Tensors with gradients are arguments of their own: ZeRO-3's hooks find those, and none inside a dataclass.
        """
        if attention_of_first:
            return self.self_attention.of_first(x, rows)
        asking, queries = (x, rows) if read is None else (x.index_select(0, read), rows.take(read))
        asking = self.self_attention(asking, x, queries, rows)
        if context is not None and context_rows is not None and self.cross_attention is not None:
            asking = self.cross_attention(asking, context, queries, context_rows, context_index)
        return self.feed_forward(asking)


@dataclass(frozen=True)
class Context:
    """What the cross-attention reads."""

    tokens: Tensor
    """(T, D) packed as `rows` says."""
    rows: Rows
    index: Tensor | None = None
    """(R,) int64 which of these rows each row of the stream reads; None: row r reads row r."""


class Stream(nn.Module):
    """Embeddings and layers; callers embed first (see Embeddings).

    `forward` runs padded rows. `body` and `last` run packed ones (see Rows), the last layer only where it is read.
    """

    def __init__(self, config: StreamConfig, vocabulary: VocabularyConfig, trained_patches: int):
        super().__init__()
        self.text_depth = config.text_depth
        self.embeddings = Embeddings(config, vocabulary, trained_patches)
        first_fusing = 0 if config.shared else config.text_layers
        self.layers = nn.ModuleList(StreamLayer(config, fuses=i >= first_fusing) for i in range(config.depth))
        self.activation_checkpointing = False
        self.apply(lambda module: init_linear(module, config.width))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        context_index: Tensor | None = None,
        *,
        cls_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Run embedded rows through the layers: those of text alone without a context, all of them with one.

        Args:
            x: (R, L, D) embedded rows.
            mask: (R, L) bool, True at rows that may be attended to; None: all.
            context: (S, N, D) what the cross-attention reads.
            context_mask: (S, N) bool; None: all visible.
            context_index: (R,) int64 which context each row reads; None: row r reads context r.
            cls_attention: also return the last layer's self-attention of the first row.

        Returns:
            (R, L, D) rows of the last layer, and (R, H, L) fp32 attention or None.
        """
        rows, read = Rows.dense(x, mask), None
        if context is not None:
            read = Context(context.flatten(0, 1), Rows.dense(context, context_mask), context_index)
        hidden = self.body(x.flatten(0, 1), rows, read)
        attention = self.last_attention(hidden, rows, fused=read is not None) if cls_attention else None
        return rows.pad(self.last(hidden, rows, read)), attention

    def body(self, x: Tensor, rows: Rows, context: Context | None = None) -> Tensor:
        """Run packed tokens (T, D) through all layers but the last: those of text alone, or all with a context."""
        for layer in self._layers(context is not None)[:-1]:
            x = self._run(layer, x, rows, context)
        return x

    def last(self, x: Tensor, rows: Rows, context: Context | None = None, read: Tensor | None = None) -> Tensor:
        """Run the last layer on what `body` returned; only the slots `read` (Q,), ascending, are computed: (Q, D).

        Every token still serves as key and value. None reads all: (T, D).
        """
        return self._run(self._layers(context is not None)[-1], x, rows, context, read)

    def last_attention(self, x: Tensor, rows: Rows, *, fused: bool = True) -> Tensor:
        """Return the last layer's self-attention of each first token to what `body` returned, (R, H, L) float32."""
        return self._layers(fused)[-1](x, rows, None, None, None, attention_of_first=True)

    def _layers(self, fused: bool) -> list[StreamLayer]:
        return cast("list[StreamLayer]", list(self.layers)[: None if fused else self.text_depth])

    def _run(
        self, layer: StreamLayer, x: Tensor, rows: Rows, context: Context | None, read: Tensor | None = None
    ) -> Tensor:
        of_context = (None, None, None) if context is None else (context.tokens, context.rows, context.index)
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, x, rows, *of_context, read, use_reentrant=False)
        return layer(x, rows, *of_context, read)


def init_linear(module: nn.Module, width: int) -> None:
    """BERT's start values: N(0, .02) at width 768, scaled so that outputs vary alike at any width; zero biases."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=0.02 * (768 / width) ** 0.5)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
