"""REFER's pickles become grounding's annotations; nothing in them is run."""

import json
import pickle
from collections import OrderedDict

import pytest

from simla_ds import cli
from simla_ds.downstream.annotations import read_annotations
from simla_ds.downstream.grounding import Grounding

REFS = [
    {"ref_id": 7, "ann_id": 70, "image_id": 1, "split": "train", "category_id": 1, "sent_ids": [1, 2]}
    | {
        "sentences": [{"sent_id": n, "sent": t, "raw": t.upper(), "tokens": t.split()} for n, t in ((1, "a"), (2, "b"))]
    },
    {"ref_id": 8, "ann_id": 80, "image_id": 2, "split": "testA", "sentences": [{"sent": "caf\u00e9 man"}]},
]
INSTANCES = {
    "images": [
        {"id": 1, "file_name": "COCO_train2014_1.jpg", "width": 64, "height": 48},
        {"id": 2, "file_name": "COCO_train2014_2.jpg", "width": 50, "height": 60},
    ],
    "annotations": [
        {"id": 70, "image_id": 1, "bbox": [1.5, 2, 30, 40.25], "category_id": 1},
        {"id": 80, "image_id": 2, "bbox": [0, 0, 10, 10]},
    ],
}
PROPOSALS = {"1": [[0, 0, 20, 20, 0.9, 3], [1, 2, 30, 40]]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(REFS, protocol=2))
    (tmp_path / "instances.json").write_text(json.dumps(INSTANCES))
    (tmp_path / "dets.json").write_text(json.dumps(PROPOSALS))
    return tmp_path


def convert(folder, *more):
    files = ("--refs", folder / "refs(unc).p", "--instances", folder / "instances.json", "--out", folder / "out")
    return cli.main(list(map(str, ("prepare", "refcoco", *files, *more))))


def test_each_expression_becomes_an_entry_that_grounding_takes(folder, capsys):
    assert convert(folder, "--proposals", folder / "dets.json") == 0
    assert "train: 2, testA: 1, without proposals: 1" in capsys.readouterr().out
    assert sorted(file.name for file in (folder / "out").iterdir()) == ["testA.json", "train.json"]
    train, test = (json.loads((folder / "out" / f"{split}.json").read_text()) for split in ("train", "testA"))
    assert [entry["text"] for entry in train] == ["a", "b"]
    shared = {"image": "train2014/COCO_train2014_1.jpg", "ref_id": 7, "split": "train", "size": [64, 48]}
    assert train[0] == shared | {"text": "a", "box": [1.5, 2, 30, 40.25], "proposals": [[0, 0, 20, 20], [1, 2, 30, 40]]}
    assert "proposals" not in test[0]
    for entry in test:
        (folder / "train2014").mkdir(exist_ok=True)
        (folder / entry["image"]).touch()
    found = read_annotations(folder / "out" / "testA.json", folder)
    assert Grounding().checked(found, train=False).entries[0]["text"] == "caf\u00e9 man"


@pytest.mark.parametrize("protocol", [0, 1, 4])
def test_pickles_of_python_2_and_3_are_read_alike(folder, protocol):
    convert(folder)
    wanted = (folder / "out" / "testA.json").read_bytes()
    (folder / "out" / "testA.json").unlink()
    (folder / "refs(unc).p").write_bytes(pickle.dumps(REFS, protocol=protocol))
    assert convert(folder, "--pictures", "train2014") == 0
    assert (folder / "out" / "testA.json").read_bytes() == wanted


def test_byte_strings_of_python_2_are_text(folder):
    ref = (
        b"(lp0\n(dp1\nS'ref_id'\nI8\nsS'ann_id'\nI80\nsS'image_id'\nI2\nsS'split'\nS'val'\ns"
        b"S'sentences'\n(lp2\n(dp3\nS'sent'\nS'man in red'\nsasa."
    )
    (folder / "refs(unc).p").write_bytes(ref)
    assert convert(folder, "--pictures", "") == 0
    (entry,) = json.loads((folder / "out" / "val.json").read_text())
    assert (entry["text"], entry["image"]) == ("man in red", "COCO_train2014_2.jpg")


class _Runs:
    def __reduce__(self):
        return exec, ("raise SystemExit('run')",)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (pickle.dumps([_Runs()]), "builtins.exec, which could run code"),
        (pickle.dumps([OrderedDict()]), "collections.OrderedDict, which could run code"),
        (pickle.dumps({}), "must hold a list of referred objects"),
        (pickle.dumps(REFS)[:-9], "cannot be read as REFER's refs"),
        (b"", "cannot be read as REFER's refs"),
        (pickle.dumps([*REFS, REFS[0] | {"ann_id": 5}, {"ref_id": 1}]), "ref 2: no box 5 in instances ref 3: no split"),
        (pickle.dumps([REFS[0] | {"split": "../val"}]), "ref 0: '../val' is no split's name"),
        (pickle.dumps([REFS[0] | {"sentences": [1]}]), "ref 0: not as REFER's"),
        (pickle.dumps([REFS[0] | {"sentences": [{"sent": b"man"}]}]), "ref 0: not as REFER's"),
        (pickle.dumps([*REFS, REFS[0] | {"split": "val", "ref_id": None}]), "ref 2: not as REFER's"),
    ],
)
def test_other_pickles_are_refused_and_nothing_is_written(folder, capsys, content, told):
    (folder / "refs(unc).p").write_bytes(content)
    assert convert(folder) == 2
    assert told in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("instances.json", "[]", "must hold `images` (id, file_name, width, height)"),
        ("instances.json", "{", "is not valid JSON"),
        (
            "instances.json",
            json.dumps(INSTANCES).replace("bbox", "box"),
            "as COCO's instances.json does: KeyError 'bbox'",
        ),
        ("instances.json", json.dumps(INSTANCES).replace("40.25", "NaN"), "ref 0: [1.5, 2, 30, nan] is no box"),
        ("dets.json", "[]", "must hold an object of boxes by image id"),
        ("dets.json", '{"1": [[1, 2, 0, 4]]}', "[1, 2, 0, 4] is no box"),
        ("dets.json", '{"1": [{"x": 1}]}', "must hold an object of boxes by image id"),
    ],
)
def test_other_json_is_refused(folder, capsys, name, content, told):
    (folder / name).write_text(content)
    assert convert(folder, "--proposals", folder / "dets.json") == 2
    assert told in capsys.readouterr().err
