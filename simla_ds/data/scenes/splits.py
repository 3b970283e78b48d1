"""Which split may show what, and how captions are kept apart.

| split        | drawings from  | things                              | photos | turned colours    |
|--------------|----------------|-------------------------------------|--------|-------------------|
| train        | noto, fluent3d | seen                                | train  | all but held out  |
| val          | noto, fluent3d | seen                                | val    | all but held out  |
| test         | noto, fluent3d | seen                                | test   | all but held out  |
| test_vendor  | twemoji        | seen                                | test   | all but held out  |
| test_concept | noto, fluent3d | at least one held out, and said     | test   | all but held out  |
| test_pairing | noto, fluent3d | seen                                | test   | at least one held |
|              |                |                                     |        | out, and said     |

The four test splits share the test photos, so that a score on test_X against one on test shows the one thing that
differs. Captions are unique to a split without a table of captions: a caption's hash names the split it may be in,
and a scene is drawn again until it does. No scene needs to know any other.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from simla_ds.data.scenes.kit import Kit

CAPTION_CLASSES = 10


@dataclass(frozen=True)
class Split:
    """The rules of one split; `needs` says what one of its things must be, and must be said to be."""

    name: str
    photos: str
    caption_classes: range
    new_vendor: bool = False
    needs: str | None = None
    """None, "concept" (a held-out thing) or "pair" (a held-out colour of a seen thing)."""

    @property
    def first_image_id(self) -> int:
        """Image ids of the splits start ten million apart."""
        return list(SPLITS).index(self.name) * 10_000_000

    def vendors(self, kit: Kit) -> tuple[str, ...]:
        """Return the sets that this split's drawings come from."""
        return kit.held_out_vendors if self.new_vendor else kit.train_vendors

    def owns(self, caption: str) -> bool:
        """Whether the caption may appear in this split, and so in no other, however its punctuation is cleaned away."""
        letters = "".join(filter(str.isalnum, caption))
        return zlib.crc32(letters.encode()) % CAPTION_CLASSES in self.caption_classes


SPLITS: dict[str, Split] = {
    split.name: split
    for split in (
        Split("train", "train", range(5)),
        Split("val", "val", range(5, 6)),
        Split("test", "test", range(6, 7)),
        Split("test_vendor", "test", range(7, 8), new_vendor=True),
        Split("test_concept", "test", range(8, 9), needs="concept"),
        Split("test_pairing", "test", range(9, 10), needs="pair"),
    )
}
