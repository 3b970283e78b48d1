"""Everything that decides what `simla prepare` writes, whatever the source."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Normalisation = Literal["as-is", "reference", "modern"]
Duplicates = Literal["off", "exact", "near"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Recorded in the manifest, what is off included."""

    shard_size: int = 1000
    """Pictures per shard."""
    shorter_side: int = 0
    """Larger pictures are made smaller, to this many pixels along the shorter side, aspect kept; 0: never."""
    quality: int = 90
    """JPEG quality of pictures that were made smaller."""
    licence: str = ""
    """What the manifest says about the licence."""
    min_side: int = 0
    """Pictures with a shorter side below this many pixels are dropped; 0: none."""
    max_aspect: float = 0
    """Pictures that are more than this many times as long as wide, or wide as long, are dropped; 0: none."""
    captions: Normalisation = "as-is"
    """as-is, reference (as the official implementation cleans them) or modern (mended, case and punctuation kept)."""
    min_words: int = 0
    """Captions with fewer words are dropped."""
    max_words: int = 0
    """Captions with more words are dropped; 0: none."""
    language: str = ""
    """Captions that are clearly in another language (ISO 639-1, as en) are dropped; empty: none."""
    drop_boilerplate: bool = False
    """Drop captions such as "stock photo", file names, copyright notices."""
    duplicates: Duplicates = "off"
    """Drop pictures that were there before under another image id: the same file, or one that looks the same."""
    near_distance: int = 4
    """Bits of 64 in which the perceptual hashes of pictures that look the same may differ."""
    against: tuple[str, ...] = ()
    """Shards of evaluation sets: pictures that look like one of theirs, or have its image id, are dropped."""

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise ValueError(f"--shard-size must be at least 1, got {self.shard_size}")
        for name in ("shorter_side", "min_side", "max_aspect", "min_words", "max_words"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must be 0 or more, got {getattr(self, name)}")
        if not 1 <= self.quality <= 95:
            raise ValueError(f"--quality must be 1 to 95, got {self.quality}")
        if 0 < self.max_aspect < 1:
            raise ValueError(f"--max-aspect must be 1 or more, or 0 for any, got {self.max_aspect}")
        if self.max_words and self.max_words < self.min_words:
            raise ValueError(f"--max-words {self.max_words} is less than --min-words {self.min_words}")
        if not 0 <= self.near_distance <= 15:
            raise ValueError(f"--near-distance must be 0 to 15 of 64 bits, got {self.near_distance}")
        for name, allowed in (("captions", get_args(Normalisation)), ("duplicates", get_args(Duplicates))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    @property
    def compares(self) -> bool:
        """Whether pictures are compared with one another or with an evaluation set."""
        return self.duplicates != "off" or bool(self.against)

    @property
    def looks(self) -> bool:
        """Whether they are compared by how they look, too."""
        return self.duplicates == "near" or bool(self.against)

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON would give it back."""
        return asdict(self) | {"against": list(self.against)}
