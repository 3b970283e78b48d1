"""The image encoder: timm's pre-LN ViT with a mask token (SIMLA section 3.2; the backbone is DeiT's)."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simla_ds.config import VisionConfig
from simla_ds.model.gelu_linear import GeluLinear
from simla_ds.model.positions import resample
from simla_ds.model.stream import init_linear
from simla_kernels import cross_attention


class _Mlp(Mlp):
    """timm's feed-forward layer, of whose activations only what enters the GELU is kept for backward."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.act = nn.Identity()
        self.fc2 = GeluLinear(self.fc2.in_features, self.fc2.out_features)


class _Attention(Attention):
    """timm's attention, but in half precision on a CPU, where SDPA's backward takes up to seven times as long."""

    def forward(self, x: Tensor, **masks: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  by name
        """(B, N, D) to (B, N, D). Masks are timm's business."""
        half_on_cpu = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
        if not (half_on_cpu and self.fused_attn) or any(
            mask is not None and mask is not False for mask in masks.values()
        ):
            return super().forward(x, **masks)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        out = cross_attention(q, k, v)
        assert isinstance(out, Tensor)  # a pair only where the weights are asked for
        return self.proj(out.transpose(1, 2).flatten(2))


class ImageEncoder(VisionTransformer):
    """A plain ViT that returns every token and can hide patches behind a learned mask token.

    It subclasses timm's ViT, so that timm's and the published weights fit by name, and so that all parameters used in
    `forward` are its own: ZeRO-3 gathers those by itself.
    """

    def __init__(self, config: VisionConfig):
        super().__init__(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depth=config.layers,
            num_heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            num_classes=0,
            attn_layer=_Attention,
            mlp_layer=_Mlp,
            global_pool="",
            dynamic_img_size=True,  # other resolutions resample pos_embed, see _tokens
        )
        self.blocks.apply(lambda module: init_linear(module, config.width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.activation_checkpointing = False
        self.visible_patches = 0
        """Patches of a masked picture that are encoded; the others join behind the encoder, as mask tokens. 0: all."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  timm's takes an attention mask, ours hides patches
        self, image: Tensor, patch_mask: Tensor | None = None, *, keep_clean: bool = False
    ) -> Tensor:
        """Encode pictures.

        Args:
            image: (B, 3, S, S) normalised, any S that is a multiple of the patch size.
            patch_mask: (B, P) bool, True at patches to hide behind the mask token.
            keep_clean: also encode the pictures with nothing hidden, in the same pass, before the masked ones.

        Returns:
            (B, P + 1, D) tokens, [CLS] first; (2B, P + 1, D) with keep_clean.
        """
        x = self.patch_embed(image.to(self.mask_token.dtype))  # (B, grid, grid, D)
        if patch_mask is None:
            return self._encode(self._tokens(x))
        hidden = torch.where(patch_mask.view(*x.shape[:3], 1), self.mask_token.to(x.dtype), x)
        if self.visible_patches:
            masked = self._encode_visible(self._tokens(hidden), patch_mask)
            return torch.cat([self._encode(self._tokens(x)), masked]) if keep_clean else masked
        return self._encode(self._tokens(torch.cat([x, hidden]) if keep_clean else hidden))

    def _tokens(self, x: Tensor) -> Tensor:
        """(B, grid, grid, D) patches to (B, P + 1, D) with [CLS] and positions."""
        cls, positions = self.cls_token, self.pos_embed
        assert cls is not None
        assert positions is not None
        x = torch.cat([cls.expand(len(x), -1, -1), x.flatten(1, 2)], dim=1)
        return self.norm_pre(self.pos_drop(x + resample(positions[0], x.shape[1] - 1)))

    def _encode(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)  # the reentrant kind breaks under ZeRO-2
            else:
                x = block(x)
        return self.norm(x)

    def _encode_visible(self, tokens: Tensor, patch_mask: Tensor) -> Tensor:
        """Encode [CLS] and the first `visible_patches` that are not hidden, as MAE does; equally many of each picture.

        Block masks hide a few patches less than they aim at: what is visible beyond those is left out as well.
        """
        rows, length = tokens.shape[:2]
        first = patch_mask.byte().argsort(dim=1, stable=True)[:, : self.visible_patches] + 1
        index = torch.cat([torch.zeros_like(first[:, :1]), first], dim=1)
        index = (index + torch.arange(rows, device=index.device)[:, None] * length).flatten()
        seen = self._encode(tokens.flatten(0, 1).index_select(0, index).unflatten(0, (rows, -1)))
        everywhere = self.mask_token.to(seen.dtype).view(1, -1).expand(rows * length, -1)
        return everywhere.index_put((index,), seen.flatten(0, 1)).unflatten(0, (rows, length))
