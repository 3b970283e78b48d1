"""Recall against brute force, re-ranking against scoring everything, and what duplicate captions leave possible."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from launch import evaluate as programme
from simla_ds.config import ModelConfig, StreamConfig, VisionConfig, VocabularyConfig
from simla_ds.data.text import TextTokenizer, train_tokenizer
from simla_ds.downstream import retrieval
from simla_ds.downstream.annotations import read_annotations
from simla_ds.downstream.gallery import PictureTokens, encode, match_scores
from simla_ds.downstream.retrieval import (
    annotated,
    ceilings,
    match_candidates,
    rank_by_similarity,
    reorder,
    retrieve,
)
from simla_ds.downstream.retrieval_tuning import Retrieval
from simla_ds.hub import SimlaProcessor, save_model_folder
from simla_ds.model.simla import Simla

WORDS = 40


@pytest.fixture(scope="module")
def model():
    return small_model(WORDS).eval()


def small_model(words):
    torch.manual_seed(0)
    config = ModelConfig(
        vision=VisionConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2),
        stream=StreamConfig(layers=2, width=16, heads=2, intermediate_size=32, max_positions=16),
        vocabulary=VocabularyConfig(size=words, visual_size=8),
        projection_size=8,
    )
    model = Simla(config)
    for parameter in model.parameters():  # away from BERT's tiny start values, so that scores differ plainly
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def pairs(images=9, captions=2, batch=4, distinct=1000, seed=0):
    """Batches of one row per caption, with captions of different lengths; few `distinct` ones make duplicates."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(images, 3, 16, 16, generator=generator)
    rows = []
    for number in range(images * captions):
        text = number % distinct
        ids = torch.cat([torch.tensor([2]), 5 + torch.arange(text, text + 2 + text % 3) % (WORDS - 5)])
        rows.append((number % images, ids))  # captions of one picture are far apart
    found = []
    for start in range(0, len(rows), batch):
        chunk = rows[start : start + batch]
        ids = torch.nn.utils.rnn.pad_sequence([ids for _, ids in chunk], batch_first=True)
        image = torch.tensor([image for image, _ in chunk])
        found.append({"image": pictures[image], "input_ids": ids, "text_mask": ids != 0, "image_id": image + 100})
    return found


def brute_force_rank(similarity, query_group, key_group):
    """Place of the first right key of each row, equal keys in their order."""
    ranks = []
    for row, group in zip(similarity.tolist(), query_group.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda j, row=row: (-row[j], j))
        ranks.append(next(place for place, j in enumerate(order) if key_group[j] == group))
    return ranks


@pytest.mark.parametrize("chunk", [1, 7, 1000])  # a row at a time; not a divisor; all at once
@pytest.mark.parametrize("levels", [3, None])  # many ties; none
def test_ranks_agree_with_brute_force(chunk, levels):
    generator = torch.Generator().manual_seed(1)
    similarity = torch.randn(23, 60, generator=generator)
    if levels:
        similarity = (similarity.sigmoid() * levels).floor()
    key_group = torch.randint(23, (60,), generator=generator)
    key_group[:23] = torch.arange(23)  # each query has one right answer at least, most have several
    ranking = rank_by_similarity(similarity, torch.eye(60), torch.arange(23), key_group, chunk=chunk)
    assert ranking.rank.tolist() == brute_force_rank(similarity, torch.arange(23), key_group)
    best = [sorted(range(60), key=lambda j, row=row: (-row[j], j))[:10] for row in similarity.tolist()]
    assert ranking.top.tolist() == best


def test_measures_are_percentages_and_places_from_one():
    ranking = rank_by_similarity(torch.eye(4), torch.eye(4), torch.tensor([0, 1, 2, 2]), torch.arange(4))
    assert ranking.rank.tolist() == [0, 0, 0, 3]
    assert ranking.measures() == {"r1": 75.0, "r5": 100.0, "r10": 100.0, "mean_rank": 1.75, "median_rank": 1.0}


def test_re_ranking_everything_agrees_with_exhaustive_scores(model):
    result = retrieve(model, pairs(), rerank=18, batch_size=5)
    gallery = encode(model, pairs(), keep_tokens=True, batch_size=5)
    image = torch.arange(9).repeat_interleave(18)
    text = gallery.text_of_caption.repeat(9)
    scores = match_scores(model, gallery, image, text, batch_size=1).view(9, 18)
    assert scores.std() > 0.01
    groups = torch.arange(9), gallery.image_of_caption
    assert result.rankings["itm/image_to_text"].rank.tolist() == brute_force_rank(scores, *groups)
    assert result.rankings["itm/text_to_image"].rank.tolist() == brute_force_rank(scores.T, *groups[::-1])


def test_pairs_are_scored_as_one_pass_over_each_pair_scores_them(model):
    """The oracle pads nothing and shares no picture between captions."""
    gallery = encode(model, pairs(), keep_tokens=True, batch_size=64)
    captions = torch.arange(18).expand(9, 18)
    scores, _ = match_candidates(model, gallery, captions, torch.zeros(18, 1, dtype=torch.long), batch_size=7)
    batches = pairs(batch=1)
    for caption, batch in enumerate(batches):
        for image in range(9):
            with torch.no_grad():
                tokens = model.image_encoder(batches[image]["image"])
                hidden, _ = model.text_over_image(batch["input_ids"], batch["text_mask"], tokens)
                logit = model.match_head(hidden[:, 0])[0, 1]
            assert scores[image, caption] == pytest.approx(float(logit), abs=2e-5)


def test_answers_behind_the_re_ranked_ones_keep_their_places():
    ranking = rank_by_similarity(torch.arange(12.0, 0, -1)[None], torch.eye(12), torch.tensor([5]), torch.arange(12))
    moved = reorder(ranking, torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([5]), torch.arange(12))
    assert moved.top[0].tolist() == [1, 2, 0, 3, 4, 5, 6, 7, 8, 9]
    assert moved.rank.tolist() == [5]
    found = reorder(ranking, torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([0]), torch.arange(12))
    assert found.rank.tolist() == [2]


def test_batching_changes_nothing(model):
    first = retrieve(model, pairs(batch=3), rerank=4, batch_size=2)
    second = retrieve(model, pairs(batch=18), rerank=4, batch_size=999)
    assert first.measures() == second.measures()
    assert all(torch.equal(first.rankings[key].top, second.rankings[key].top) for key in first.rankings)


def test_a_random_model_is_near_chance(model):
    result = retrieve(model, pairs(images=64, captions=1, batch=64), rerank=0)
    assert result.chance["text_to_image"] == 100 / 64
    assert result.rankings["itc/text_to_image"].measures()["r1"] < 10


def test_equal_captions_score_alike_and_their_ceiling_is_stated(model):
    # captions 0..11 of pictures 0..5 and again 0..5: caption n is in words n % 4
    batches = pairs(images=6, captions=2, distinct=4)
    gallery = encode(model, batches, keep_tokens=False, batch_size=8)
    assert gallery.text_of_caption.tolist() == [n % 4 for n in range(12)]
    assert gallery.image_of_caption.tolist() == [n % 6 for n in range(12)]
    # words 0 were said of 0, 4, 2; words 1 of 1, 5, 3; words 2 of 2, 0, 4; words 3 of 3, 1, 5: once each
    found = ceilings(gallery)
    assert found["text_to_image/r1"] == pytest.approx(100 * 4 / 12)
    assert found["text_to_image/r5"] == 100
    # pictures 0 to 3 come first with their words; 4 and 5 come second with words 0 and 1, third with words 2 and 3
    assert found["image_to_text/r1"] == pytest.approx(100 * 4 / 6)
    assert found["image_to_text/r5"] == 100
    result = retrieve(model, batches, rerank=6)
    for key, ranking in result.rankings.items():
        assert ranking.measures()["r1"] <= result.ceilings[f"{key.partition('/')[2]}/r1"]


def test_dropout_is_refused(model):
    with pytest.raises(ValueError, match="eval"):
        retrieve(model.train(), pairs())
    model.eval()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    train_tokenizer(["a red square", "a blue square on grey", "a red square", "blue grey"], root / "tokenizer", 60)
    words = TextTokenizer(root / "tokenizer").vocabulary.size
    save_model_folder(small_model(words), root / "final", root / "tokenizer")
    return root / "final"


@pytest.fixture
def annotations(tmp_path):
    entries = []
    for number, (colour, captions) in enumerate(
        ((200, ["a red square", "A red square."]), (90, "a blue square"), (30, ["grey"]))
    ):
        Image.fromarray(np.full((20, 24, 3), colour, dtype=np.uint8)).save(tmp_path / f"{number}.png")
        entries.append({"image": f"{number}.png", "caption": captions})
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(entries))
    return file


def rows_of(file):
    return Retrieval().checked(read_annotations(file, None), train=False)


def test_annotations_give_a_row_per_caption(model_folder, annotations):
    first, second = annotated(rows_of(annotations), SimlaProcessor.from_pretrained(model_folder), 2)
    assert first["image_id"].tolist() == [0, 0, 1]
    assert second["image_id"].tolist() == [2]
    assert torch.equal(first["image"][0], first["image"][1])
    assert torch.equal(first["input_ids"][0], first["input_ids"][1])  # cleaned alike


def test_the_programme_prints_a_table_and_writes_json(model_folder, annotations, monkeypatch, capsys, tmp_path):
    out = tmp_path / "out.json"
    options = ["--model", model_folder, "--annotations", annotations, "--rerank", "2", "--json", out]
    assert call(monkeypatch, ["--task", "retrieval", *options]) == 0
    assert "4 captions of 3 pictures" in capsys.readouterr().out
    assert {"itc/image_to_text/r1", "itm/text_to_image/r10", "captions"} <= json.loads(out.read_text()).keys()


@pytest.fixture
def shards(tmp_path):
    """Two shards whose keys start anew, as some tools write them: with one damaged picture, and one picture twice."""
    records = [
        {"0": ("a red square", "a blue square", "grey"), "1": ("grey",)},
        {"0": ("a red square on grey",), "1": ("blue",), "2": ("a square",)},
    ]
    for number, samples in enumerate(records):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for key, captions in samples.items():
                named = {"image_id": "the same"} if (number, key) in ((0, "1"), (1, "1")) else {}
                picture = io.BytesIO()
                Image.fromarray(np.full((20, 24, 3), 40 * len(captions[0]) % 255, dtype=np.uint8)).save(picture, "PNG")
                data = b"not a picture" if (number, key) == (1, "2") else picture.getvalue()
                fields = json.dumps({"caption": list(captions), **named}).encode()
                for suffix, content in ((".png", data), (".json", fields)):
                    info = tarfile.TarInfo(key + suffix)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return tmp_path


def test_shards_give_all_captions_of_every_picture_and_say_what_is_left_out(
    model_folder, shards, monkeypatch, capsys, tmp_path
):
    out = tmp_path / "out.json"
    options = ["--model", model_folder, "--data", shards, "--rerank", "2", "--json", out]
    assert call(monkeypatch, ["--task", "retrieval", *options]) == 0
    said = capsys.readouterr()
    assert "6 captions of 3 pictures" in said.out
    assert "1 sample(s) left out: picture unreadable 1" in said.err
    assert json.loads(out.read_text())["left_out"] == 1


@pytest.mark.parametrize(("protocol", "rerank", "size", "tokens"), [("official", 128, 384, 30), ("fast", 16, 16, 25)])
def test_a_named_protocol_sets_candidates_and_sizes_and_is_told(
    model_folder, annotations, monkeypatch, capsys, tmp_path, protocol, rerank, size, tokens
):
    seen, encoder = [], small_model(WORDS).image_encoder.__class__
    forward = encoder.forward
    monkeypatch.setattr(
        encoder, "forward", lambda self, image, *a, **k: seen.append(image.shape) or forward(self, image)
    )
    options = ["--model", model_folder, "--annotations", annotations, "--protocol", protocol]
    assert call(monkeypatch, ["--task", "retrieval", *options, "--json", tmp_path / "out.json"]) == 0
    assert f"protocol {protocol}: ITM orders {rerank} candidates, {size} px, {tokens} tokens" in capsys.readouterr().out
    assert {shape[-1] for shape in seen} == {size}
    stored = json.loads((tmp_path / "out.json").read_text())
    assert (stored["protocol"], stored["rerank"], stored["image_size"]) == (protocol, rerank, size)
    assert stored["max_tokens"] == tokens


def test_the_official_protocol_orders_more_candidates_of_more_pictures():
    assert [retrieval.PROTOCOLS["official"].candidates(pictures) for pictures in (1000, 1014, 5000)] == [128, 128, 256]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "vqa", "--data", "x", "--protocol", "fast"], "--protocol and --rerank are for retrieval"),
        (["--task", "probes", "--data", "x", "--rerank", "16"], "--protocol and --rerank are for retrieval"),
        (["--task", "retrieval", "--annotations", "x", "--inputs", "text"], "are not for retrieval"),
        (
            ["--task", "retrieval", "--annotations", "x", "--workers", "2"],
            "--workers 2 must be 0 or more, and is not for",
        ),
        (["--task", "probes", "--data", "x", "--workers", "2"], "--workers 2 must be 0 or more, and is not for"),
        (["--task", "vqa", "--data", "x", "--workers", "-1"], "--workers -1 must be 0 or more"),
        (["--task", "retrieval", "--annotations", "nowhere.json"], "nowhere.json"),
        (["--task", "retrieval", "--data", "nowhere"], "matches no shards"),
        (["--task", "retrieval", "--data", "nowhere", "--weights", "teacher"], "has no teacher weights"),
        (["--task", "retrieval", "--data", "nowhere", "--rerank", "-1"], "--rerank must be 0 or more"),
        (
            ["--task", "nlvr2", "--data", "x", "--fidelity", "official"],
            "--answers and --fidelity are for vqa",
        ),
        (["--task", "nlvr2", "--data", "x", "--image-root", "y"], "--image-root is for --annotations"),
        (["--task", "vqa", "--data", "x", "--json", "no/where.json"], "--json no/where.json: there is no folder"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(model_folder, monkeypatch, capsys, options, message):
    assert call(monkeypatch, [*options, "--model", model_folder]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_captions_of_a_picture_may_stand_in_rows_of_their_own(model_folder, annotations, monkeypatch, capsys):
    """By path, or by an image_id where one is given; .jsonl as .json."""
    rows = [
        {"image": f"{number}.png", "caption": caption, "image_id": None}
        for caption in ("a red square", "grey")
        for number in range(2)
    ]
    rows += [
        {"image": "2.png", "caption": "a square", "image_id": 7},
        {"image": "1.png", "caption": "b", "image_id": "7"},
    ]
    lines = annotations.with_suffix(".jsonl")
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    batch = next(annotated(rows_of(lines), SimlaProcessor.from_pretrained(model_folder)))
    assert batch["image_id"].tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(batch["image"][4], batch["image"][5])
    assert not torch.equal(batch["image"][0], batch["image"][2])
    options = ["--task", "retrieval", "--model", model_folder, "--annotations", lines, "--protocol", "fast"]
    assert call(monkeypatch, options) == 0
    assert "6 captions of 3 pictures" in capsys.readouterr().out


def test_a_protocol_counts_pictures_and_not_captions(model, monkeypatch):
    monkeypatch.setattr(retrieval, "MANY", 9)
    few = retrieval.Protocol(rerank=2, rerank_many=4, image_size=None, max_tokens=None)
    assert retrieve(model, pairs(images=9), rerank=few).rerank == 2
    assert retrieve(model, pairs(images=10), rerank=few).rerank == 4


@pytest.mark.parametrize("content", ["{", '{"image": "a"}', '[{"image": 3, "caption": "a"}]', '[{"image": "a"}]'])
def test_broken_annotations_are_named(tmp_path, content):
    file = tmp_path / "broken.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"broken\.json"):
        rows_of(file)


def call(monkeypatch, options):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, options)])
    try:
        return programme.main()
    except SystemExit as end:
        return end.code


# --- what is kept of pictures, and who scores what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_memory", [1 << 20, 100])  # all of it; less than one picture
def test_tokens_come_back_as_they_were_from_memory_and_from_a_file(dtype, in_memory):
    tokens, store = torch.randn(7, 3, 5).to(dtype), PictureTokens(in_memory)
    for part in tokens.split(3):
        store.append(part)
    wanted = torch.tensor([5, 0, 5, 6])
    assert torch.equal(store.read(wanted), tokens[wanted])
    store.append(tokens[:1])  # after reading
    assert torch.equal(store.read(torch.tensor([7, 6])), tokens[[0, 6]])


@pytest.mark.parametrize("ranks", [2, 3, 50])  # even shares; uneven ones; more ranks than pairs
def test_ranks_score_a_share_each_and_together_what_one_scores(model, monkeypatch, ranks):
    gallery = encode(model, pairs(), keep_tokens=True, batch_size=64)
    captions, pictures = torch.arange(4).expand(9, 4), torch.zeros(18, 1, dtype=torch.long)
    alone = match_candidates(model, gallery, captions, pictures, batch_size=7)
    shares, scored = [], []

    def share(rows):
        shares.append(rows)
        return rows.repeat(ranks)  # of as many as all ranks give

    def counted(model, gallery, image, text, **options):
        scored.append(len(image))
        return match_scores(model, gallery, image, text, **options)

    monkeypatch.setattr(retrieval, "world_size", lambda: ranks)
    monkeypatch.setattr(retrieval, "gather_by_rank", share)
    monkeypatch.setattr(retrieval, "match_scores", counted)
    for rank in range(ranks):
        monkeypatch.setattr(retrieval, "rank", lambda rank=rank: rank)
        match_candidates(model, gallery, captions, pictures, batch_size=7)
    monkeypatch.setattr(retrieval, "gather_by_rank", lambda rows: torch.cat(shares))
    together = match_candidates(model, gallery, captions, pictures, batch_size=7)
    assert max(scored) <= -(-(9 * 4 + 18) // ranks)
    torch.testing.assert_close(together, alone)
