"""Captions to ids: both kinds of folder, literal special tokens, determinism over processes."""

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from simla_ds.data.text import SPECIAL_TOKENS, TextTokenizer, require_same_words, train_tokenizer

ANIMALS = ("dog", "cat", "zebra", "elephant", "kangaroo", "fox")
CAPTIONS = [
    f"A {colour} {animal} is sitting to the {side} of the {other}'s ball."
    for colour in ("red", "dark blue", "green")
    for animal in ANIMALS
    for side in ("left", "right")
    for other in ANIMALS
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    train_tokenizer(CAPTIONS, out, 200)
    return out


@pytest.fixture(params=["trained", "tokenizer.json", "vocab.txt"])
def folder(request, trained, bert_vocabulary, tmp_path):
    """Every kind of folder: trained here, a Hugging Face folder, and one with only a word list."""
    if request.param == "trained":
        return trained
    if request.param == "tokenizer.json":
        return bert_vocabulary
    shutil.copy(bert_vocabulary / "vocab.txt", tmp_path)
    return tmp_path


def test_a_trained_vocabulary_starts_with_the_special_tokens(trained):
    words = json.loads((trained / "tokenizer.json").read_text())["model"]["vocab"]
    assert [words[token] for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert sorted(words.values()) == list(range(len(words)))
    assert len(words) <= 200
    vocabulary = TextTokenizer(trained).vocabulary
    assert (vocabulary.size, vocabulary.special, vocabulary.visual_size) == (len(words), (0, 1, 2, 3, 4), 0)


def test_frequent_words_become_one_token(trained):
    ids, word_index = TextTokenizer(trained).encode("the dark blue elephant")
    assert word_index == [-1, 0, 1, 2, 3, -1]
    assert len(ids) == 6


def test_training_gives_the_same_bytes_in_another_process_and_another_order(trained, tmp_path):
    script = (
        "import json, sys; from pathlib import Path; from simla_ds.data.text import train_tokenizer;"
        "train_tokenizer(reversed(json.loads(sys.stdin.read())), Path(sys.argv[1]), 200)"
    )
    for run in ("a", "b", "c"):
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / run)], input=json.dumps(CAPTIONS), text=True, check=True
        )
        assert _hashes(tmp_path / run) == _hashes(trained)


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_transformers_reads_a_trained_folder_and_agrees(trained):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    ours = TextTokenizer(trained)
    for theirs in (
        AutoTokenizer.from_pretrained(str(trained), local_files_only=True),
        PreTrainedTokenizerFast.from_pretrained(str(trained), local_files_only=True),
    ):
        assert theirs(CAPTIONS[7])["input_ids"] == ours.encode(CAPTIONS[7])[0]
        assert (theirs.pad_token_id, theirs.mask_token_id) == (0, 4)
        assert len(theirs) == ours.vocabulary.size


def test_the_two_kinds_of_bert_folder_agree_with_transformers(bert_vocabulary, tmp_path):
    from transformers import AutoTokenizer

    shutil.copy(bert_vocabulary / "vocab.txt", tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(bert_vocabulary), local_files_only=True)
    for caption in [*CAPTIONS[:3], "Café-crème, naïve 東京 unbelievably!", "", "  \t\n ", "a\u200bb\x00c 🦊"]:
        expected = theirs(caption, truncation=True, max_length=25, padding=False)["input_ids"]
        assert TextTokenizer(bert_vocabulary).encode(caption)[0] == expected
        assert TextTokenizer(tmp_path).encode(caption)[0] == expected
    vocabulary = TextTokenizer(tmp_path).vocabulary
    assert (vocabulary.size, *vocabulary.special) == (30522, 0, 100, 101, 102, 103)


@pytest.mark.parametrize("text", ["[MASK]", "a [SEP] b", "[CLS][PAD][UNK]", "x[MASK]y", "[mask]", " [SEP]  [MASK] "])
def test_special_tokens_written_in_a_caption_are_plain_text(folder, text):
    tokenizer = TextTokenizer(folder)
    ids, word_index = tokenizer.encode(text)
    forbidden = set(tokenizer.vocabulary.special) - {tokenizer.vocabulary.unk}  # an unknown "[" is [UNK], rightly
    assert forbidden.isdisjoint(ids[1:-1])
    assert len(ids) > 3
    assert word_index[1] == 0
    assert word_index[1:-1] == sorted(word_index[1:-1])


def test_brackets_kept_whole_by_the_splitter_still_give_no_special_id(trained, tmp_path):
    description = json.loads((trained / "tokenizer.json").read_text())
    description["pre_tokenizer"], description["normalizer"] = {"type": "WhitespaceSplit"}, None
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    ids, _ = TextTokenizer(tmp_path).encode("the [MASK] dog [SEP]")
    assert ids[2] == ids[4] == TextTokenizer(tmp_path).vocabulary.unk


@pytest.mark.parametrize("add_sep", [True, False])
def test_a_long_caption_keeps_its_length_and_its_end(folder, add_sep):
    tokenizer = TextTokenizer(folder, max_tokens=8, add_sep=add_sep)
    ids, word_index = tokenizer.encode(" ".join(["dog"] * 10_000))
    assert len(ids) == len(word_index) == 8
    assert ids[0] == tokenizer.vocabulary.cls
    assert (ids[-1] == tokenizer.vocabulary.sep) is add_sep
    assert word_index == [-1, 0, 1, 2, 3, 4, 5, -1] if add_sep else [-1, 0, 1, 2, 3, 4, 5, 6]
    assert tokenizer.vocabulary.add_sep is add_sep


def test_pieces_of_a_word_share_its_number(bert_vocabulary):
    ids, word_index = TextTokenizer(bert_vocabulary).encode("an unaffable dog's toy")
    assert word_index == [-1, 0, 1, 1, 1, 2, 3, 4, 5, -1]
    assert len(ids) == len(word_index)


def test_an_empty_caption_has_only_its_ends(folder):
    vocabulary = TextTokenizer(folder).vocabulary
    assert TextTokenizer(folder).encode("") == ([vocabulary.cls, vocabulary.sep], [-1, -1])
    assert TextTokenizer(folder, add_sep=False).encode("") == ([vocabulary.cls], [-1])


def test_a_lone_surrogate_does_not_stop_the_run(folder):
    ids, _ = TextTokenizer(folder).encode(json.loads('"a \\ud800 dog"'))
    assert ids[1] == TextTokenizer(folder).encode("a")[0][1]


def test_decoding_gives_the_words_back(folder):
    tokenizer = TextTokenizer(folder)
    ids = tokenizer.encode("The red dog is left")[0]
    assert tokenizer.decode(ids + [tokenizer.vocabulary.pad] * 3) == "the red dog is left"
    assert tokenizer.decode([tokenizer.vocabulary.mask, ids[2]]) == "[MASK] red"


def test_a_pickled_tokenizer_encodes_the_same(folder):
    tokenizer = TextTokenizer(folder, max_tokens=9)
    assert pickle.loads(pickle.dumps(tokenizer)).encode(CAPTIONS[0]) == tokenizer.encode(CAPTIONS[0])


def test_wrong_folders_are_refused_in_one_line_that_names_the_key(bert_vocabulary, tmp_path):
    with pytest.raises(ValueError, match=r"^data\.tokenizer=.*neither tokenizer\.json nor vocab\.txt.*$"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"^data\.tokenizer=.*cannot be read.*$"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\ndog\n")
    with pytest.raises(ValueError, match="has no sep_token, mask_token"):
        TextTokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"data\.max_tokens=2"):
        TextTokenizer(bert_vocabulary, max_tokens=2)


def test_training_refuses_no_text_and_too_small_a_vocabulary(tmp_path):
    with pytest.raises(ValueError, match="no caption"):
        train_tokenizer(["", "  "], tmp_path / "none", 100)
    with pytest.raises(ValueError, match="vocabulary_size=10 is smaller than"):
        train_tokenizer(CAPTIONS, tmp_path / "small", 10)
    assert not (tmp_path / "small").exists()


def test_a_tokenizer_that_numbers_words_otherwise_is_refused(trained, tmp_path):
    require_same_words(trained, trained)
    require_same_words(trained, tmp_path)  # a folder without one says nothing
    train_tokenizer([caption.replace("dog", "cow") for caption in CAPTIONS], tmp_path / "other", 200)
    with pytest.raises(ValueError, match=r"word pieces have another number .* set data.tokenizer=.*other"):
        require_same_words(trained, tmp_path / "other")
