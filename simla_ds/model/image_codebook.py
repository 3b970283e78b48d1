"""The published encoder of DALL-E's dVAE (Ramesh et al. 2021) as a FlavaImageCodebook, XMM's visual tokeniser.

encoder.pkl's convolutions are `w` and `b`, its groups and residual paths plain sequences; otherwise both are the same
network. Sizes are read off the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simla_ds.model.loading import summary

if TYPE_CHECKING:
    from transformers import FlavaImageCodebook

_INPUT, _OUTPUT = "blocks.input.w", "blocks.output.conv.w"


def is_image_codebook(weights: Mapping[str, Tensor]) -> bool:
    """Say whether these are the parameters of a dVAE's encoder, under the published names."""
    return _INPUT in weights


def image_codebook(weights: Mapping[str, Tensor], source: Path) -> FlavaImageCodebook:
    """Return the encoder with these published parameters, in float32.

    Raises:
        ValueError: parameters are missing, unknown or of another shape; names `source` and the first of them.
    """
    from transformers import FlavaImageCodebook, FlavaImageCodebookConfig  # seconds, and rarely needed

    if _OUTPUT not in weights or weights[_INPUT].dim() != 4 or weights[_OUTPUT].dim() != 4:
        raise ValueError(f"{source} is no encoder of a dVAE: it has {_INPUT}, but no {_OUTPUT} of four dimensions")
    config = FlavaImageCodebookConfig(
        hidden_size=weights[_INPUT].shape[0],
        input_channels=weights[_INPUT].shape[1],
        vocab_size=weights[_OUTPUT].shape[0],
        num_blocks_per_group=len(
            {found[1] for n in weights if (found := re.match(r"blocks\.group_1\.(block_\d+)", n))}
        ),
    )
    with torch.device("meta"):  # no random start that is overwritten
        model = FlavaImageCodebook(config)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {_translated(name): value.detach().float() for name, value in weights.items()}
    if lost := wanted.keys() - given.keys():
        raise ValueError(f"{source} lacks {summary(sorted(lost))} of the encoder of a dVAE; copy it again")
    if odd := given.keys() - wanted.keys():
        raise ValueError(f"{source} holds {summary(sorted(odd))}, which the encoder of a dVAE doesn't have")
    for name, shape in wanted.items():
        if tuple(given[name].shape) != shape:
            raise ValueError(
                f"{source}: {name} is {tuple(given[name].shape)}, which does not go with {_INPUT} "
                f"{tuple(weights[_INPUT].shape)}: it should be {shape}"
            )
    model.load_state_dict(given, assign=True)
    return model.eval()


def _translated(name: str) -> str:
    name = re.sub(r"(group_\d+)\.", r"\1.group.", name).replace("res_path.", "res_path.path.")
    return re.sub(r"\.b$", ".bias", re.sub(r"\.w$", ".weight", name))
