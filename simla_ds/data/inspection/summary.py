"""Findings added up into a report, without keeping the samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from simla_ds.data.inspection.look import Finding
from simla_ds.data.sample import stable_hash

LISTED = 1000
"""Bad samples and repeated things that a report names; all are counted."""
QUANTILES = {"least": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1.0}


class Summary:
    """Counts and histograms of what was looked at."""

    def __init__(self) -> None:
        self.samples = 0
        self.bad: Counter[str] = Counter()
        self.bad_samples: list[dict[str, str]] = []
        self.formats: Counter[str] = Counter()
        self.shorter: Counter[int] = Counter()
        self.longer: Counter[int] = Counter()
        self.kilobytes: Counter[int] = Counter()
        self.per_picture: Counter[int] = Counter()
        self.words: Counter[int] = Counter()
        self.tokens: Counter[int] = Counter()
        self.unknown = 0
        self.vocabulary: Counter[str] = Counter()
        self.shown: list[Finding] = []
        self.same_picture: list[list[str]] = []
        self.repeated_pictures = self.repeated_keys = 0
        self._keys: set[int] = set()
        self._pictures: dict[int, tuple[int, str]] = {}
        self._captions: Counter[int] = Counter()
        self._said: dict[int, str] = {}

    @property
    def usable(self) -> int:
        """Samples that training would use."""
        return self.samples - sum(count for reason, count in self.bad.items() if not reason.startswith("shard "))

    def add(self, finding: Finding) -> None:
        """Take note of one sample, or of a damaged shard."""
        if finding.reason:
            self.samples += not finding.reason.startswith("shard ")
            self.bad[finding.reason] += 1
            if len(self.bad_samples) < LISTED:
                self.bad_samples.append({"sample": finding.key, "reason": finding.reason})
            return
        self.samples += 1
        self.formats[finding.kind] += 1
        self.shorter[min(finding.width, finding.height)] += 1
        self.longer[max(finding.width, finding.height)] += 1
        self.kilobytes[finding.bytes >> 10] += 1
        self.per_picture[len(finding.captions)] += 1
        self.tokens.update(finding.tokens)
        self.unknown += finding.unknown
        if finding.thumbnail:
            self.shown.append(finding)
        for caption in finding.captions:
            words = caption.split()
            self.words[len(words)] += 1
            self.vocabulary.update(words)
        self._compare(finding)

    def _compare(self, finding: Finding) -> None:
        """Count what was there before. A picture under its own image id again has got another caption, no more."""
        key = stable_hash(finding.key.partition(":")[2])
        self.repeated_keys += key in self._keys
        self._keys.add(key)
        first = self._pictures.setdefault(finding.picture, (finding.image_id, finding.key))
        if first[0] != finding.image_id:
            self.repeated_pictures += 1
            if len(self.same_picture) < LISTED:
                self.same_picture.append([first[1], finding.key])
        for caption in finding.captions:
            said = stable_hash(caption)
            self._captions[said] += 1
            if self._captions[said] == 2:
                self._said[said] = caption

    def report(self, max_tokens: int, has_tokenizer: bool) -> dict[str, Any]:
        """Return everything as JSON."""
        captions = self.words.total()
        often = [(self._said[said], count) for said, count in self._captions.most_common(20) if count > 1]
        return {
            "samples": self.samples,
            "usable": self.usable,
            "bad": dict(self.bad.most_common()),
            "bad_samples": self.bad_samples,
            "pictures": {
                "formats": dict(self.formats.most_common()),
                "shorter_side": quantiles(self.shorter),
                "longer_side": quantiles(self.longer),
                "kilobytes": quantiles(self.kilobytes),
            },
            "captions": {
                "count": captions,
                "per_picture": quantiles(self.per_picture),
                "words": dict(sorted(self.words.items())),
                "tokens": dict(sorted(self.tokens.items())),
                "cut": sum(count for length, count in self.tokens.items() if length > max_tokens),
                "unknown_tokens": self.unknown if has_tokenizer else None,
            },
            "vocabulary": {
                "words": len(self.vocabulary),
                "seen_once": sum(count == 1 for count in self.vocabulary.values()),
                "commonest": dict(self.vocabulary.most_common(50)),
            },
            "duplicates": {
                "keys": self.repeated_keys,
                "pictures": self.repeated_pictures,
                "same_picture": self.same_picture,
                "captions": captions - len(self._captions),
                "commonest_captions": dict(often),
            },
        }


def quantiles(histogram: Mapping[int, int]) -> dict[str, int]:
    """Return the values at QUANTILES of {value: count}; nothing when it is empty."""
    values, total = sorted(histogram.items()), sum(histogram.values())
    found = {}
    for name, share in QUANTILES.items():
        rest = share * (total - 1)
        for value, count in values:
            rest -= count
            if rest < 0:
                found[name] = value
                break
    return found
