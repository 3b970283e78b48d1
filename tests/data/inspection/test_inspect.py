"""`simla inspect`: exact counts, every bad sample named, and status 1 only when training would stop."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from simla_ds.cli import main
from simla_ds.config import Config, DataConfig, TrainConfig
from simla_ds.data.inspection.inspect import inspect_shards
from simla_ds.data.inspection.summary import quantiles
from simla_ds.data.loader import PairLoader
from simla_ds.data.shards import write_shards
from simla_ds.data.text import TextTokenizer, train_tokenizer
from tests.data.broken import broken_samples, broken_shards
from tests.data.convert.samples import jpeg


def sample(number, caption, **fields):
    return f"{number:04d}", {
        "jpg": jpeg(number, 60 + number, 40),
        "json": json.dumps({"caption": caption, **fields}).encode(),
    }


@pytest.fixture
def shards(tmp_path):
    """40 pictures in 5 shards, number 3 a second time under another image id, 4 under its own; a tokenizer beside."""
    captions = [f"a dog and {'very ' * i}small cat" for i in range(38)]
    samples = [
        sample(i, [caption, "stock photo"] if i % 2 else caption, image_id=i) for i, caption in enumerate(captions)
    ]
    samples += [("0038", sample(3, "again", image_id="other")[1]), ("0039", sample(4, "again", image_id=4)[1])]
    write_shards(samples, tmp_path / "train", 9)
    train_tokenizer([*captions, "stock photo"], tmp_path / "tokenizer", 100)
    return tmp_path / "train"


def test_counts_are_exact(shards):
    report = inspect_shards(str(shards), workers=1, progress=False)
    assert (report["shards"]["count"], report["samples"], report["usable"]) == (5, 40, 40)
    assert report["pictures"]["formats"] == {"JPEG": 40}
    assert report["pictures"]["shorter_side"] == {"least": 40, "5 %": 40, "median": 40, "95 %": 40, "most": 40}
    assert (report["pictures"]["longer_side"]["least"], report["pictures"]["longer_side"]["most"]) == (60, 97)
    captions = report["captions"]
    assert captions["count"] == 59
    assert captions["words"][2] == 19  # stock photo
    assert captions["words"][30] == 13  # a dog and ... is cut at 30 words from 25 on
    assert sum(captions["tokens"].values()) == 59
    tokenizer = TextTokenizer(shards.parent / "tokenizer", max_tokens=1000)
    assert max(captions["tokens"]) == len(tokenizer.encode("a dog and " + "very " * 27)[0])
    assert captions["cut"] == sum(count for length, count in captions["tokens"].items() if length > 25) > 0
    assert report["duplicates"]["keys"] == 0
    assert report["duplicates"]["pictures"] == 1
    assert report["duplicates"]["same_picture"] == [["shard-000000.tar:0003", "shard-000004.tar:0038"]]
    assert report["duplicates"]["commonest_captions"]["stock photo"] == 19
    assert report["vocabulary"]["commonest"]["dog"] == 38
    assert report["stops"] == []


def test_bad_samples_are_named_with_the_reason(tmp_path, capsys):
    _, reasons = broken_shards(tmp_path / "train")
    assert main(["inspect", str(tmp_path / "train"), "--batch-size", "4", "--workers", "2", "--quiet", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bad"] == dict(reasons)
    _, unusable = broken_samples()
    found = {bad["sample"].partition(":")[2]: bad["reason"] for bad in report["bad_samples"]}
    assert {key: reason for key, (_, reason) in unusable.items()}.items() <= found.items()
    assert {"sample": "x-cut.tar", "reason": "shard truncated"} in report["bad_samples"]


def refused(shards, tokenizer):
    """Whether training ends at its first batch of 8."""
    config = Config(data=DataConfig(train=shards, workers=0), train=TrainConfig(batch_size=8))
    try:
        next(PairLoader(config, TextTokenizer(tokenizer), 0))
    except ValueError:
        return True
    return False


@pytest.mark.parametrize(("count", "good", "status"), [(12, 0, 1), (7, 7, 1), (12, 3, 0), (12, 12, 0)])
def test_the_status_says_whether_training_would_stop(tmp_path, capsys, bert_vocabulary, count, good, status):
    samples = [sample(i, "a dog") if i < good else (f"{i:04d}", {"jpg": b"", "txt": b"a dog"}) for i in range(count)]
    write_shards(samples, tmp_path / "train", 5)
    shards = str(tmp_path / "train")
    assert main(["inspect", shards, "--batch-size", "8", "--workers", "1", "--quiet"]) == status
    said = capsys.readouterr().out
    assert ("training would stop" in said) == bool(status) == refused(shards, bert_vocabulary)
    assert ("will hold some of the 3 usable samples twice" in said) == (good == 3)


def test_no_shards_is_wrong_use(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert "matches no shards" in capsys.readouterr().err


def test_a_limit_looks_at_samples_spread_evenly(shards):
    report = inspect_shards(str(shards), limit=10, workers=1, progress=False)
    assert report["samples"] == 10
    assert report["pictures"]["longer_side"]["most"] > 85
    assert inspect_shards(str(shards), limit=1000, workers=1, progress=False)["samples"] == 40
    assert inspect_shards(str(shards), limit=10, batch_size=32, workers=1, progress=False)["stops"] == []


class Page(HTMLParser):
    """Which tags a page has, whether each is closed, and its pictures."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.sources = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name == "src"]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_shows_captions_as_text(tmp_path):
    evil = "<script>alert('x')</script> & <b> dog"
    samples = [sample(i, evil, image_id=i) for i in range(7)] + [("<i>bad", {"jpg": b"", "txt": b"a"})]
    write_shards(samples, tmp_path / "train", 100)
    inspect_shards(str(tmp_path / "train"), out=tmp_path / "page", workers=1, progress=False)
    text = (tmp_path / "page/index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert not page.tags & {"script", "i"}
    assert "&lt;i&gt;bad" in text
    assert page.sources == ["contact_sheet.png"]
    sheet = Image.open(tmp_path / "page/contact_sheet.png")
    assert sheet.size == (12 + 6 * 204, 12 + 2 * (192 + 12 + 60 + 12))
    assert len(np.unique(np.asarray(sheet.crop((12, 12, 204, 204))))) > 50  # a picture, not paper
    assert json.loads((tmp_path / "page/report.json").read_text())["usable"] == 7


def test_quantiles_are_values_that_occur():
    assert quantiles({1: 50, 7: 49, 100: 1}) == {"least": 1, "5 %": 1, "median": 1, "95 %": 7, "most": 100}
    assert quantiles({5: 1}) == dict.fromkeys(("least", "5 %", "median", "95 %", "most"), 5)
    assert quantiles({}) == {}


def test_beside_a_file_that_is_no_tar_nothing_is_left(tmp_path, capsys):
    (tmp_path / "fake.jpg").write_bytes(b"no tar at all" * 100)
    assert main(["inspect", str(tmp_path / "fake.jpg"), "--quiet", "--workers", "1"]) != 0
    assert [path.name for path in tmp_path.iterdir()] == ["fake.jpg"]
