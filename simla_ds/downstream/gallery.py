"""What retrieval compares, encoded once, and ITM's word on pairs of it.

I pictures, T captions, U distinct captions, N tokens a picture, L tokens a caption, D width, E projection width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from simla_ds.model.rows import Rows
from simla_ds.model.simla import Simla
from simla_ds.model.stream import Context

TOKENS_IN_MEMORY = 256 << 20
"""Bytes of pictures' tokens kept in memory; COCO's 5,000 pictures at 384 px have 8.9 GB in float32."""


class PictureTokens:
    """Tokens of pictures by number, (N, D) each: in memory as long as they are few, then in a temporary file."""

    def __init__(self, in_memory: int = TOKENS_IN_MEMORY):
        self._file = tempfile.SpooledTemporaryFile(max_size=in_memory)  # noqa: SIM115  lives as long as this does
        self._shape, self._dtype, self._bytes = torch.Size(), torch.float32, 0

    def append(self, tokens: Tensor) -> None:
        """Add (B, N, D); every picture has the same shape and dtype."""
        self._shape, self._dtype = tokens.shape[1:], tokens.dtype
        self._bytes = self._shape.numel() * tokens.element_size()
        self._file.seek(0, 2)
        for picture in tokens.cpu().contiguous():
            self._file.write(picture.flatten().view(torch.uint8).numpy().data)

    def read(self, numbers: Tensor) -> Tensor:
        """Return the tokens of pictures (S,), (S, N, D) on the host."""
        data = bytearray()
        for number in numbers.tolist():
            self._file.seek(number * self._bytes)
            data += self._file.read(self._bytes)
        return torch.frombuffer(data, dtype=self._dtype).view(len(numbers), *self._shape)


@dataclass(frozen=True)
class Gallery:
    """Everything that is compared, encoded once. Equal captions (the same tokens) are encoded once and score alike."""

    image_feature: Tensor
    """(I, E) float32 unit vectors."""
    image_tokens: PictureTokens | None
    """(I, N, D) in the model's dtype; None when nothing is re-ranked."""
    text_feature: Tensor
    """(U, E) float32 unit vectors."""
    input_ids: Tensor
    """(U, L) int64."""
    text_mask: Tensor
    """(U, L) bool."""
    text_of_caption: Tensor
    """(T,) int64."""
    image_of_caption: Tensor
    """(T,) int64, the picture that a caption was written for."""


def encode(
    model: Simla, batches: Iterable[Mapping[str, Any]], *, keep_tokens: bool, batch_size: int, progress: bool = False
) -> Gallery:
    """Encode every picture and every distinct caption once. ValueError when there is nothing to encode."""
    device = next(model.parameters()).device
    features, tokens = [], PictureTokens() if keep_tokens else None
    image_number: dict[int, int] = {}
    text_number: dict[tuple[int, ...], int] = {}
    text_of_caption, image_of_caption = [], []
    for batch in tqdm(batches, desc="encoding", unit="batch", disable=not progress):
        ids = batch["image_id"].tolist()
        new = [row for row, image in enumerate(ids) if image not in image_number and image not in ids[:row]]
        for row in new:
            image_number[ids[row]] = len(image_number)
        if new:
            encoded = model.image_encoder(batch["image"][new].to(device))
            features.append(model.image_feature(encoded).cpu())
            if tokens is not None:
                tokens.append(encoded)
        for image, row, mask in zip(ids, batch["input_ids"], batch["text_mask"], strict=True):
            text_of_caption.append(text_number.setdefault(tuple(row[mask].tolist()), len(text_number)))
            image_of_caption.append(image_number[image])
    if not features:
        raise ValueError("there are no pairs to retrieve; check the annotations or the shards")
    rows = [torch.tensor(text) for text in text_number]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=model.config.vocabulary.pad)
    text_mask = torch.arange(input_ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return Gallery(
        image_feature=torch.cat(features),
        image_tokens=tokens,
        text_feature=torch.cat(list(_text_features(model, input_ids, text_mask, batch_size, device))),
        input_ids=input_ids,
        text_mask=text_mask,
        text_of_caption=torch.tensor(text_of_caption),
        image_of_caption=torch.tensor(image_of_caption),
    )


def _text_features(model: Simla, ids: Tensor, mask: Tensor, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    for rows, row_mask in zip(ids.split(batch_size), mask.split(batch_size), strict=True):
        length = int(row_mask.sum(1).max())
        rows, row_mask = rows[:, :length].to(device), row_mask[:, :length].to(device)
        yield model.text_feature(model.stream(model.stream.embeddings(rows), row_mask)[0]).cpu()


@torch.no_grad()
def match_scores(
    model: Simla, gallery: Gallery, image: Tensor, text: Tensor, *, batch_size: int, progress: bool = False
) -> Tensor:
    """Return ITM's raw logit of class 1 for pairs of pictures (P,) and distinct captions (P,), (P,) float32.

    A batch has the pairs of one picture, which should follow each other: every layer projects its keys and values once
    for all of them. Captions are not padded, and of the last layer only [CLS] is computed.
    """
    if gallery.image_tokens is None:
        raise ValueError("the gallery was encoded without keep_tokens; there is nothing to read pairs from")
    device, stream, scores = next(model.parameters()).device, model.stream, []
    with tqdm(total=len(image), desc="re-ranking", unit="pair", disable=not progress) as bar:
        for numbers, of_picture in _by_picture(image, text, batch_size):
            mask = gallery.text_mask[numbers]
            mask = mask[:, : int(mask.sum(1).max())]
            rows = Rows.of(mask.to(device), mask.flatten().nonzero()[:, 0].to(device))
            picture = gallery.image_tokens.read(of_picture).to(device)
            context = Context(picture[0], Rows.dense(picture), rows.positions(device).new_zeros(rows.count))
            ids = gallery.input_ids[numbers, : rows.width].to(device)
            x = stream.body(stream.embeddings(rows.pack(ids), rows.positions(device)), rows, context)
            x = stream.last(x, rows, context, rows.first(device))
            scores.append(model.match_head(x).float()[:, 1].cpu())
            bar.update(len(numbers))
    return torch.cat(scores)


def _by_picture(image: Tensor, text: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the captions of at most so many neighbouring pairs of one picture, and the picture, (1,)."""
    pictures, counts = image.unique_consecutive(return_counts=True)
    for picture, captions in zip(pictures.split(1), text.split(counts.tolist()), strict=True):
        for part in captions.split(most):
            yield part, picture
