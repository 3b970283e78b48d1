"""Captions to token ids: a WordPiece vocabulary trained on the data at hand, or any Hugging Face BERT folder.

Both kinds of folder are read by the `tokenizers` library alone: nothing is fetched, and a caption costs about 70 us.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from simla_ds.config import VocabularyConfig

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Ids 0 to 4 of a trained vocabulary, as VocabularyConfig expects by default."""
_ROLES = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS, strict=True))
_ALPHABET_LIMIT = 1_000
"""Characters kept; words with rarer ones become [UNK]."""
_MIN_FREQUENCY = 2
"""A piece seen once is a memory of one caption."""


def train_tokenizer(captions: Iterable[str], out: Path, vocabulary_size: int) -> None:
    """Learn at most vocabulary_size lower-case WordPieces from captions and save a Hugging Face folder at out.

    The same multiset of captions gives the same bytes. Raises ValueError when there is no text, or when the
    vocabulary is too small for the special tokens and the alphabet.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or each loader worker forked later prints a warning
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for caption in captions:
        text = normalizer.normalize_str(_valid_unicode(caption))
        counts.update(word for word, _ in splitter.pre_tokenize_str(text))
    if not counts:
        raise ValueError("no caption has a word to learn a vocabulary from; check the captions of data.train")
    words, alphabet = _keep_common_characters(counts)
    reserved = list(SPECIAL_TOKENS) + alphabet
    if vocabulary_size < len(reserved):
        raise ValueError(
            f"vocabulary_size={vocabulary_size} is smaller than the {len(reserved)} special tokens and characters of "
            f"the captions; set it to {len(reserved)} or more"
        )
    vocabulary = _learn_word_pieces(words, reserved, vocabulary_size)
    tokenizer = _bert_tokenizer(vocabulary, lowercase=True)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": True, "model_max_length": 512, **_ROLES}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _keep_common_characters(counts: Counter[str]) -> tuple[dict[str, int], list[str]]:
    """Return words spelled in the commonest characters with their counts, and the pieces that spell any of them."""
    characters: Counter[str] = Counter()
    for word, count in counts.items():
        for character in word:
            characters[character] += count
    ranked = sorted(characters, key=lambda character: (-characters[character], character))
    kept = set(ranked[:_ALPHABET_LIMIT])
    words = {word: counts[word] for word in sorted(counts) if kept.issuperset(word)}
    continuing = {"##" + character for word in words for character in word[1:]}
    return words, sorted(kept) + sorted(continuing)


def _learn_word_pieces(words: dict[str, int], reserved: list[str], vocabulary_size: int) -> dict[str, int]:
    """Return piece -> id, the reserved pieces first.

    Single characters are passed as special tokens because the trainer numbers its own alphabet in hash order, which
    differs from run to run and decides ties between merges.
    """
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary_size, min_frequency=_MIN_FREQUENCY, special_tokens=reserved, show_progress=False
    )
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator(_repeat(words), trainer)
    return learner.get_vocab()


def _repeat(words: dict[str, int]) -> Iterator[str]:
    """Yield each word as often as it was counted, at most 1,000 at a time."""
    for word, count in words.items():
        for start in range(0, count, 1_000):
            yield " ".join([word] * min(1_000, count - start))


def _bert_tokenizer(vocabulary: dict[str, int], *, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def require_same_words(tokenizer: Path, model: Path) -> None:
    """Refuse a tokenizer that numbers words otherwise than the one of a model folder: no shape would show it.

    A folder without a tokenizer says nothing. Raises ValueError.
    """
    if not any((model / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        return
    ours, theirs = (_read_folder(folder).get_vocab(with_added_tokens=True) for folder in (tokenizer, model))
    if ours != theirs:
        differ = sum(theirs.get(piece) != number for piece, number in ours.items())
        raise ValueError(
            f"data.tokenizer={tokenizer} is not what {model} was trained with: {differ} of its {len(ours)} word pieces "
            f"have another number in the {len(theirs)} there; set data.tokenizer={model}"
        )


class TextTokenizer:
    """Captions to ids, by a folder with tokenizer.json or with vocab.txt (one word piece a line).

    Special tokens are unknown to the splitter, so that "[MASK]" in a caption is three plain pieces. Picklable.

    Args:
        folder: as data.tokenizer; ValueError when it holds no tokenizer or lacks a special token.
        max_tokens: longest result of encode, [CLS] and [SEP] included.
        add_sep: end with [SEP]; False for published SIMLA weights.
    """

    def __init__(self, folder: str | Path, *, max_tokens: int = 25, add_sep: bool = True):
        if max_tokens < 2 + add_sep:
            raise ValueError(f"data.max_tokens={max_tokens} leaves no room for a word; set it to {2 + add_sep} or more")
        folder = Path(folder)
        full = _read_folder(folder)
        known = full.get_vocab(with_added_tokens=True)
        names = _special_names(folder)
        missing = [role for role, token in names.items() if token not in known]
        if missing:
            raise ValueError(f"data.tokenizer={folder} has no {', '.join(missing)}; give a BERT tokenizer's folder")
        pad, unk, cls, sep, mask = (known[token] for token in names.values())
        size = max(known.values()) + 1
        self.vocabulary = VocabularyConfig(size=size, pad=pad, unk=unk, cls=cls, sep=sep, mask=mask, add_sep=add_sep)
        self.max_tokens = max_tokens
        self._words_only = _without_special_tokens(full, {pad, unk, cls, sep, mask})
        self._never = {pad, cls, sep, mask}

    def encode(self, caption: str) -> tuple[list[int], list[int]]:
        """Return token ids and, per token, the number of its word in the caption (-1 at [CLS] and [SEP]).

        A word is what the splitter sees: punctuation marks are words of their own ("dog's" is three).
        """
        try:
            encoding = self._words_only.encode(caption, add_special_tokens=False)
        except TypeError:  # tokenizers refuses a lone surrogate, which json.loads lets through
            encoding = self._words_only.encode(_valid_unicode(caption), add_special_tokens=False)
        room = self.max_tokens - 1 - self.vocabulary.add_sep
        ids = encoding.ids[:room]
        words = [-1 if word is None else word for word in encoding.word_ids[:room]]
        if not self._never.isdisjoint(ids):  # a splitter that keeps brackets can find "[SEP]" in the vocabulary
            ids = [self.vocabulary.unk if id in self._never else id for id in ids]
        if self.vocabulary.add_sep:
            return [self.vocabulary.cls, *ids, self.vocabulary.sep], [-1, *words, -1]
        return [self.vocabulary.cls, *ids], [-1, *words]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; [PAD], [CLS] and [SEP] are left out, [MASK] and [UNK] are shown."""
        hidden = {self.vocabulary.pad, self.vocabulary.cls, self.vocabulary.sep}
        return self._words_only.decode([int(id) for id in ids if int(id) not in hidden], skip_special_tokens=False)


def _valid_unicode(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _read_folder(folder: Path) -> Tokenizer:
    """Read tokenizer.json, or build a BERT tokenizer from vocab.txt."""
    settings = _settings(folder)
    try:
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        if (folder / "vocab.txt").is_file():
            pieces = (folder / "vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
            vocabulary = {piece.rstrip("\r"): id for id, piece in enumerate(pieces)}
            return _bert_tokenizer(vocabulary, lowercase=settings.get("do_lower_case", True))
    except Exception as error:  # tokenizers raises bare Exception on a bad file
        raise ValueError(f"data.tokenizer={folder} cannot be read: {' '.join(str(error).split())}") from error
    raise ValueError(
        f"data.tokenizer={folder} has neither tokenizer.json nor vocab.txt; give the folder of a Hugging Face tokenizer"
    )


def _settings(folder: Path) -> dict:
    path = folder / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _special_names(folder: Path) -> dict[str, str]:
    """Return role -> token as tokenizer_config.json names it, BERT's name where it doesn't."""
    named = {role: _settings(folder).get(role) or default for role, default in _ROLES.items()}
    return {role: token["content"] if isinstance(token, dict) else token for role, token in named.items()}


def _without_special_tokens(tokenizer: Tokenizer, special: set[int]) -> Tokenizer:
    """Return a copy that adds nothing, pads nothing and reads special tokens as plain text."""
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = [
        token for token in description["added_tokens"] if not token["special"] and token["id"] not in special
    ]
    description.update(post_processor=None, truncation=None, padding=None)
    return Tokenizer.from_str(json.dumps(description))
