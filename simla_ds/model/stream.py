"""The single stream: one post-LN BERT that reads text alone, text over image and image over text (SIMLA section 3.1).

R rows, L tokens, D width. With `shared` every layer has cross-attention and serves all three; otherwise (ALBEF) the
first text_layers read text alone and fusion_layers with cross-attention follow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simla_ds.config import StreamConfig, VocabularyConfig
from simla_ds.model.layer_norm import layer_norm
from simla_kernels import cross_attention

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

    def forward(self, rows: Tensor) -> Tensor:
        """Embed (R, L) int64 word ids, or (R, N, D) image rows, which get text positions. Returns (R, L or N, D)."""
        if rows.is_floating_point():
            x = rows + self._image_positions(rows.shape[1])
        else:
            x = self.word(rows) + self.position(torch.arange(rows.shape[1], device=rows.device))
        if self.token_type is not None:
            x = x + self.token_type(torch.zeros(1, dtype=torch.long, device=rows.device))
        return self.dropout(self.norm(x))

    def _image_positions(self, length: int) -> Tensor:
        """Return (length, D); at another resolution than the trained one its patch rows are resampled as a grid."""
        # through the module's forward and not its weight: under ZeRO-3 only a forward gathers it
        device = self.position.weight.device
        table = self.position(torch.arange(self.trained_patches + 1, device=device))
        if length == self.trained_patches + 1:
            return table
        old, new = round(self.trained_patches**0.5), round((length - 1) ** 0.5)
        grid = table[1:].T.reshape(1, -1, old, old)
        grid = F.interpolate(grid.float(), size=(new, new), mode="bicubic", align_corners=False).to(table.dtype)
        return torch.cat([table[:1], grid.flatten(2)[0].T])


class Attention(nn.Module):
    """Multi-head attention with residual and LayerNorm; self-attention when no context is given."""

    def __init__(self, config: StreamConfig):
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.output = nn.Linear(config.width, config.width)
        self.norm = layer_norm(config.width, LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        context: Tensor | None = None,
        context_index: Tensor | None = None,
        cls_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the new rows (R, L, D) and, when asked for, the first row's attention (R, H, keys).

        mask is (rows of the keys, keys) bool, True at visible keys. context is (S, N, D); row r of x reads context
        row context_index[r], whose keys and values are projected once however many rows read them.
        """
        source = x if context is None else context
        q, k, v = (self._split(layer(t)) for layer, t in ((self.query, x), (self.key, source), (self.value, source)))
        dropout_p = self.dropout.p if self.training else 0.0
        out = cross_attention(q, k, v, mask, context_index, dropout_p, return_cls_row=cls_attention)
        out, cls_row = out if isinstance(out, tuple) else (out, None)
        out = self.output(out.transpose(1, 2).flatten(2))
        return self.norm(x + self.dropout(out)), cls_row

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers around an erf GELU, with residual and LayerNorm."""

    def __init__(self, config: StreamConfig):
        super().__init__()
        self.up = nn.Linear(config.width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.width)
        self.norm = layer_norm(config.width, LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(R, L, D) to (R, L, D)."""
        return self.norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


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
        mask: Tensor | None,
        context: Tensor | None,
        context_mask: Tensor | None,
        context_index: Tensor | None,
        cls_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the new rows (R, L, D) and, when asked for, the first row's self-attention (R, H, L) fp32."""
        x, cls_row = self.self_attention(x, mask, cls_attention=cls_attention)
        if context is not None and self.cross_attention is not None:
            x, _ = self.cross_attention(x, context_mask, context, context_index)
        return self.feed_forward(x), cls_row


class Stream(nn.Module):
    """Embeddings and layers. `forward` runs embedded rows; callers embed first (see Embeddings)."""

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
        depth = len(self.layers) if context is not None else self.text_depth
        cls_row = None
        for i, layer in enumerate(self.layers[:depth]):
            wanted = cls_attention and i == depth - 1
            arguments = (x, mask, context, context_mask, context_index, wanted)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, cls_row = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x, cls_row = layer(*arguments)
        return x, cls_row


def init_linear(module: nn.Module, width: int) -> None:
    """BERT's start values: N(0, .02) at width 768, scaled so that outputs vary alike at any width; zero biases."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=0.02 * (768 / width) ** 0.5)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
