"""`simla embed` and `simla score`: the model's own numbers, exact counts, the same bytes after a stop."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from simla_ds import scoring
from simla_ds.cli import main
from simla_ds.data.outputs import copy_pairs
from simla_ds.data.shards import ShardFiles, find_shards, index_tar, open_shard, write_shards
from simla_ds.data.text import TextTokenizer, train_tokenizer
from simla_ds.hub import SimlaModel, SimlaProcessor, save_model_folder
from simla_ds.model.simla import Simla
from tests.tiny import model_config, spread_weights

CAPTIONS = ("A red dog, on a hill!", "a dog", "hill")
COUNT, BAD = 11, 4


def picture(number: int) -> bytes:
    colours = np.random.default_rng(number).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).resize((50, 40), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def samples():
    for i in range(COUNT):
        said: dict = {"caption": list(CAPTIONS[: 1 + i % 3]), "image_id": i} if i % 2 else {"caption": CAPTIONS[0]}
        yield f"{i:04d}", {"png": b"" if i == BAD else picture(i), "json": json.dumps(said).encode()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Shards of 5, 5 and 1 samples, the last of them without its end, and an empty one; a model folder."""
    folder = tmp_path_factory.mktemp("scored")
    paths = write_shards(samples(), folder / "shards", 5)
    end = max(offset + size for offset, size in index_tar(str(paths[-1])).sample(0).values())
    paths[-1].write_bytes(paths[-1].read_bytes()[: end + 512])  # the sample is whole
    (folder / "shards" / "shard-000009.tar").write_bytes(bytes(1024))
    train_tokenizer(["a red dog on a hill"] * 3, folder / "tokenizer", 60)
    vocabulary = replace(TextTokenizer(folder / "tokenizer").vocabulary, visual_size=20)
    model = spread_weights(Simla(replace(model_config(), vocabulary=vocabulary)))
    save_model_folder(model, folder / "model", folder / "tokenizer")
    return folder


def command(name: str, made: Path, out: Path, *more: str) -> list[str]:
    return [name, str(made / "shards"), "--model", str(made / "model"), "--out", str(out), "--workers", "0", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def lines(folder: Path, pattern: str) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob(pattern)) for line in path.read_text().splitlines()]


def test_scores_are_the_models_own_and_every_pair_is_counted(made, tmp_path, capsys):
    assert main(command("score", made, tmp_path / "out", "--batch-size", "3")) == 0
    rows = lines(tmp_path / "out", "scores-*.jsonl")
    expected = [
        (key, caption)
        for key, members in samples()
        if members["png"]
        for caption in np.atleast_1d(json.loads(members["json"])["caption"])
    ]
    assert [(row["key"], row["caption"]) for row in rows] == expected
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["pictures"], manifest["captions"], manifest["kept"]) == (COUNT - 1, len(expected), len(expected))
    assert manifest["skipped"] == {"picture empty": 1, "shard truncated": 1, "shard empty": 1}
    assert "10 pictures, 14 captions; skipped: picture empty: 1" in capsys.readouterr().out
    model = SimlaModel.from_pretrained(made / "model").eval()
    processor = SimlaProcessor.from_pretrained(made / "model")
    for row in rows[::4]:
        inputs = processor(Image.open(io.BytesIO(picture(int(row["key"])))), row["caption"])
        with torch.no_grad():
            alone = model(**inputs)
        assert row["itc"] == pytest.approx(float(alone.similarity[0, 0]), abs=1e-5)
        assert row["itm"] == pytest.approx(float(alone.itm_logits.softmax(-1)[0, 1]), abs=1e-5)
    assert len({row["itm"] for row in rows}) > 10


@pytest.mark.parametrize("kind", ["parquet", "npy"])
def test_features_are_unit_vectors_in_the_order_of_the_captions(made, tmp_path, kind):
    assert main(command("embed", made, tmp_path / "out", "--format", kind)) == 0
    assert main(command("score", made, tmp_path / "scores")) == 0
    if kind == "parquet":
        table = parquet.read_table(sorted((tmp_path / "out").glob("*.parquet")))
        image, text = (np.stack(table[name].to_numpy()) for name in ("image_feature", "text_feature"))
        said = table.select(["key", "caption_number", "caption"]).to_pylist()
    else:
        image, text = (
            np.concatenate([np.load(path) for path in sorted((tmp_path / "out").glob(f"*.{name}.npy"))])
            for name in ("image", "text")
        )
        said = lines(tmp_path / "out", "features-*.jsonl")
    rows = lines(tmp_path / "scores", "scores-*.jsonl")
    assert [(row["key"], row["caption"]) for row in said] == [(row["key"], row["caption"]) for row in rows]
    assert [row["caption_number"] for row in said][:4] == [0, 0, 1, 0]
    assert image.dtype == np.float32
    assert np.abs(np.linalg.norm(image, axis=1) - 1).max() < 1e-5
    assert (image * text).sum(1) == pytest.approx([row["itc"] for row in rows], abs=1e-5)


@pytest.mark.parametrize("name", ["embed", "score"])
def test_a_stopped_run_goes_on_to_the_same_bytes(made, tmp_path, monkeypatch, name):
    more = ["--min-itc", "-0.2"] if name == "score" else []
    assert main(command(name, made, tmp_path / "undisturbed", *more)) == 0
    written = []

    def stop(path, text):
        if path.name == "record-000001.json" and not written:
            written.append(path)
            raise KeyboardInterrupt
        path.write_text(text)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "write_text", stop)
        with pytest.raises(KeyboardInterrupt):
            main(command(name, made, tmp_path / "out", *more))
    assert not (tmp_path / "out" / "manifest.json").exists()
    first = (tmp_path / "out" / "record-000000.json").stat().st_mtime_ns
    assert main(command(name, made, tmp_path / "out", "--workers", "2", *more)) == 0
    assert (tmp_path / "out" / "record-000000.json").stat().st_mtime_ns == first  # not done again
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_pairs_above_the_thresholds_make_shards_of_their_own(made, tmp_path, capsys):
    assert main(command("score", made, tmp_path / "all")) == 0
    rows = lines(tmp_path / "all", "scores-*.jsonl")
    least = sorted(row["itm"] for row in rows)[len(rows) // 2]
    assert main(command("score", made, tmp_path / "out", "--min-itm", str(least), "--min-itc", "-1")) == 0
    wanted = [(row["key"], row["caption"]) for row in rows if row["itm"] >= least]
    assert f"kept {len(wanted)} of {len(rows)} captions" in capsys.readouterr().out
    files = ShardFiles([open_shard(path) for path in find_shards(str(tmp_path / "out"))])
    found = []
    for number, shard in enumerate(files.shards):
        assert not shard.problem
        for i in range(len(shard)):
            members = files.read(number, i)
            assert members["png"] == picture(int(shard.key(i)))
            said = json.loads(members["json"] or b"")
            was = json.loads(dict(samples())[shard.key(i)]["json"])
            assert {**said, "caption": 0} == {**was, "caption": 0}
            assert type(said["caption"]) is type(was["caption"])
            found += [(shard.key(i), caption) for caption in np.atleast_1d(said["caption"])]
    assert found == wanted


def test_other_samples_are_not_taken_for_those_of_a_stopped_run(made, tmp_path, capsys):
    """As many of them, of the same sizes, in files of the same names: another key."""
    folders = [tmp_path / name / "shards" for name in ("one", "other")]
    for key, folder in zip(("a", "b"), folders, strict=True):
        write_shards([(key, {"png": picture(0), "json": b'{"caption": "a dog"}'})], folder, 5)
    more = ["--model", str(made / "model"), "--out", str(tmp_path / "out"), "--workers", "0"]
    assert main(["score", str(folders[0]), *more]) == 0
    assert main(["score", str(folders[1]), *more]) == 2
    assert "was begun with another data_sha256" in capsys.readouterr().err


def test_what_does_not_fit_is_refused_in_one_line(made, tmp_path, capsys):
    assert main(command("score", made, tmp_path / "out")) == 0
    for arguments, told in (
        (command("score", made, tmp_path / "out", "--min-itm", "0.5"), "another options"),
        (command("embed", made, tmp_path / "out"), "another command"),
        (command("embed", made, made), "holds other files"),
        (command("score", made, tmp_path / "x", "--weights", "teacher"), "no teacher weights"),
        (["score", "/nowhere", "--model", str(made / "model"), "--out", str(tmp_path / "y")], "matches no shards"),
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert told in said
        assert said.count("\n") == 1
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "y").exists()


def test_a_pair_whose_json_is_no_object_is_copied_too(tmp_path):
    write_shards([("0", {"png": picture(0), "json": b"[[0, 0, 5, 5]]", "txt": b"a dog"})], tmp_path / "in", 5)
    files = ShardFiles([open_shard(str(tmp_path / "in/shard-000000.tar"))])
    copy_pairs(files, 0, [{"place": 0, "caption": "a dog"}], tmp_path / "out.tar")
    copied = ShardFiles([open_shard(str(tmp_path / "out.tar"))]).read(0, 0)
    assert json.loads(copied["json"] or b"") == {"caption": "a dog"}
    assert copied["png"] == picture(0)
