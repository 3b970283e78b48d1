"""Each source of `simla prepare`, from a small sample in its published format to shards and back."""

import json

import pyarrow as pa
import pytest
from pyarrow.parquet import write_table

from simla_ds.cli import main
from simla_ds.data.convert.pictures import Judge
from tests.data.convert.samples import dropped, jpeg, put, put_csv, put_tar, read


def prepare(source, *arguments, status=0):
    """Run the command as a user does, in this process."""
    assert main(["prepare", source, *map(str, arguments), "--workers", "1", "--quiet"]) == status


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def test_albef_json(tmp_path):
    images = tmp_path / "images"
    for i in range(3):
        put(images / f"coco/{i}.jpg", jpeg(i))
    entries = [
        {"image": "/export/share/coco/0.jpg", "caption": "a dog", "image_id": "coco_0"},
        {"image": "/export/share/coco/0.jpg", "caption": "a brown dog", "image_id": "coco_0"},
        {"image": "coco/1.jpg", "caption": ["two cats", "cats"], "image_id": 17},
        {"image": "coco/2.jpg", "caption": "größe 🐶"},
        {"image": "coco/9.jpg", "caption": "not there"},
        {"image": "coco/1.jpg", "caption": 5},
        {"caption": "no picture"},
        "no entry",
    ]
    file = put(tmp_path / "train.json", entries)
    replace = ("--replace", f"/export/share={images}")
    prepare("albef-json", "--annotations", file, "--images", images, *replace, "--out", tmp_path / "out")
    assert read(tmp_path / "out") == [
        (jpeg(0), {"caption": "a dog", "image_id": "coco_0", "source": "/export/share/coco/0.jpg"}),
        (jpeg(0), {"caption": "a brown dog", "image_id": "coco_0", "source": "/export/share/coco/0.jpg"}),
        (jpeg(1), {"caption": ["two cats", "cats"], "image_id": "17", "source": "coco/1.jpg"}),
        (jpeg(2), {"caption": "größe 🐶", "image_id": "coco/2.jpg", "source": "coco/2.jpg"}),
    ]
    assert dropped(tmp_path / "out") == [
        ("coco/9.jpg", "picture missing"),
        ("coco/1.jpg", "caption not text"),
        ("train.json[6]", "picture missing"),
        ("train.json[7]", "caption missing"),
    ]
    made = manifest(tmp_path / "out")
    assert (made["rows"], made["kept"], made["captions"]) == (8, 4, 5)
    assert made["dropped"] == {"caption missing": 1, "caption not text": 1, "picture missing": 2}


def test_albef_json_is_read_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("simla_ds.data.convert.rows._READ", 7)  # every entry lies across several reads
    put(tmp_path / "0.jpg", jpeg(0))
    entries = [{"image": "0.jpg", "caption": f'{i}, "quoted] }}" \\'} for i in range(20)]
    put(tmp_path / "a.json", "\ufeff " + json.dumps(entries, indent=1))
    prepare("albef-json", "--annotations", tmp_path / "a.json", "--images", tmp_path, "--out", tmp_path / "out")
    assert [fields["caption"] for _, fields in read(tmp_path / "out")] == [entry["caption"] for entry in entries]


def coco_images(folder):
    for i in range(4):
        put(folder / f"val2014/COCO_val2014_{i:012d}.jpg", jpeg(i))
    return folder


def test_coco_official(tmp_path):
    images = coco_images(tmp_path / "images")
    content = {
        "info": {"year": 2014},
        "images": [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg", "height": 40, "width": 60} for i in range(5)],
        "annotations": [
            {"id": 10 * i + j, "image_id": i, "caption": f"caption {j} of {i}"} for j in range(5) for i in (0, 1, 3, 4)
        ],
    }
    file = put(tmp_path / "captions_val2014.json", content)
    prepare("coco", "--annotations", file, "--images", images / "val2014", "--out", tmp_path / "out")
    assert read(tmp_path / "out") == [
        (
            jpeg(i),
            {
                "caption": [f"caption {j} of {i}" for j in range(5)],
                "image_id": f"coco:{i}",
                "source": f"COCO_val2014_{i:012d}.jpg",
            },
        )
        for i in (0, 1, 3)
    ]
    assert [reason for _, reason in dropped(tmp_path / "out")] == ["caption missing", "picture missing"]


def karpathy(tmp_path):
    images = [
        {
            "filepath": "val2014",
            "filename": f"COCO_val2014_{i:012d}.jpg",
            "cocoid": i,
            "imgid": 90 + i,
            "split": split,
            "sentids": [i],
            "sentences": [{"raw": f"A dog {i}.", "tokens": ["a", "dog", str(i)], "imgid": 90 + i, "sentid": i}],
        }
        for i, split in enumerate(["restval", "test", "train", "val"])
    ]
    return put(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})


@pytest.mark.parametrize(("split", "ids"), [("train", [0, 2]), ("val", [3]), ("test", [1])])
def test_coco_karpathy(tmp_path, split, ids):
    images, file = coco_images(tmp_path / "images"), karpathy(tmp_path)
    prepare("coco", "--annotations", file, "--images", images, "--split", split, "--out", tmp_path / "out")
    found = read(tmp_path / "out")
    assert [(data, fields["caption"], fields["image_id"]) for data, fields in found] == [
        (jpeg(i), f"A dog {i}.", f"coco:{i}") for i in ids
    ]


def test_flickr_in_karpathys_form_has_ids_of_its_own(tmp_path):
    put(tmp_path / "images/7.jpg", jpeg(7))
    picture = {"filename": "7.jpg", "imgid": 7, "split": "test", "sentences": [{"raw": "a man"}]}
    file = put(tmp_path / "dataset_flickr30k.json", {"images": [picture], "dataset": "flickr30k"})
    prepare(
        "coco", "--annotations", file, "--images", tmp_path / "images", "--split", "test", "--out", tmp_path / "out"
    )
    assert read(tmp_path / "out")[0][1]["image_id"] == "flickr30k:7"


def test_visual_genome(tmp_path):
    put(tmp_path / "VG_100K/1.jpg", jpeg(1))
    put(tmp_path / "VG_100K_2/2.jpg", jpeg(2))
    put(tmp_path / "VG_100K_2/4.jpg", jpeg(4))
    regions = [
        {
            "id": i,
            "regions": [
                {
                    "region_id": 10 * i + j,
                    "image_id": i,
                    "phrase": f"thing {j}",
                    "x": 1,
                    "y": 2,
                    "width": 3,
                    "height": 4,
                }
                for j in range(i)
            ],
        }
        for i in (1, 2, 3)
    ] + [{"id": 4, "regions": []}]
    data = [{"image_id": 1, "coco_id": None}, {"image_id": 2, "coco_id": 555, "url": "https://example.org/2.jpg"}]
    prepare(
        "visual-genome",
        *("--regions", put(tmp_path / "region_descriptions.json", regions)),
        *("--image-data", put(tmp_path / "image_data.json", data)),
        *("--images", tmp_path / "VG_100K", tmp_path / "VG_100K_2", "--out", tmp_path / "out"),
    )
    assert read(tmp_path / "out") == [
        (jpeg(1), {"caption": "thing 0", "image_id": "visual_genome:1", "source": "1.jpg"}),
        (jpeg(2), {"caption": ["thing 0", "thing 1"], "image_id": "coco:555", "source": "2.jpg"}),
    ]
    assert dropped(tmp_path / "out") == [("3.jpg", "picture missing"), ("4.jpg", "caption missing")]


def img2dataset(folder, tars=2, per_tar=5):
    """What img2dataset leaves: failed downloads are numbers without a sample."""
    for tar in range(tars):
        members = []
        for i in range(per_tar):
            key = f"{tar:05d}{i:04d}"
            described = {
                "caption": f"caption {key}",
                "url": f"https://example.org/{key}.jpg",
                "key": key,
                "status": "success",
            }
            picture = jpeg(i) if (tar, i) != (1, 3) else jpeg(i)[:300]
            members += [
                (f"{key}.jpg", picture),
                (f"{key}.json", json.dumps(described | {"width": 60, "height": 40, "exif": "{}"}).encode()),
                (f"{key}.txt", f"caption {key}".encode()),
            ]
        put_tar(folder / f"{tar:05d}.tar", members)
        put(folder / f"{tar:05d}_stats.json", {"count": 9, "successes": 5, "failed_to_download": 4})
    return folder


def test_img2dataset_is_checked_where_it_is(tmp_path):
    folder = img2dataset(tmp_path / "cc3m")
    before = {path: path.read_bytes() for path in folder.glob("*.tar")}
    prepare("img2dataset", "--shards", folder)
    assert {path: path.read_bytes() for path in folder.glob("*.tar")} == before
    found = [fields["key"] for _, fields in read(folder)]
    assert found == [f"{tar:05d}{i:04d}" for tar in range(2) for i in range(5) if (tar, i) != (1, 3)]
    assert dropped(folder) == [("00001.tar:000010003", "picture truncated")]
    made = manifest(folder)
    assert (made["rows"], made["kept"], made["dropped"]) == (10, 9, {"picture truncated": 1})
    assert made["downloads"] == {"count": 18, "successes": 10, "failed_to_download": 8}


def test_img2dataset_checks_only_tars_that_have_changed_since(tmp_path, monkeypatch):
    folder = img2dataset(tmp_path / "cc3m")
    put_tar(folder / "00002.tar", [])
    prepare("img2dataset", "--shards", folder)
    first = manifest(folder)
    assert first["dropped"] == {"picture truncated": 1, "shard empty": 1}
    judged = []
    whole = Judge.judge
    monkeypatch.setattr(Judge, "judge", lambda self, row: judged.append(row.name) or whole(self, row))
    prepare("img2dataset", "--shards", folder)
    assert (judged, manifest(folder)) == ([], first)
    put_tar(folder / "00002.tar", [("0.jpg", jpeg(1)), ("0.txt", b"late")])
    prepare("img2dataset", "--shards", folder)
    assert judged == ["00002.tar:0"]
    assert manifest(folder)["kept"] == first["kept"] + 1


def test_img2dataset_is_written_anew_when_asked(tmp_path):
    folder = img2dataset(tmp_path / "cc3m")
    sizes = ("--shorter-side", 20, "--shard-size", 4)
    prepare("img2dataset", "--shards", folder / "{00000..00001}.tar", "--out", tmp_path / "out", *sizes)
    assert [info["samples"] for info in manifest(tmp_path / "out")["shards"].values()] == [4, 4, 1]
    assert [fields["caption"] for _, fields in read(tmp_path / "out")] == [
        f"caption {tar:05d}{i:04d}" for tar in range(2) for i in range(5) if (tar, i) != (1, 3)
    ]
    assert [path.name for path in folder.glob("*.npz")] == []
    prepare("img2dataset", "--shards", folder, "--shorter-side", 20, status=2)


def test_folder_with_texts(tmp_path):
    folder = tmp_path / "mine"
    put(folder / "b/dog.JPG", jpeg(0))
    put(folder / "b/dog.txt", "a dog\nthe same dog\n\n")
    put(folder / "a cat.jpeg", jpeg(1))
    put(folder / "a cat.txt", "a cat")
    put(folder / "alone.jpg", jpeg(2))
    put(folder / "blind.txt", "no picture")
    put(folder / "silent.jpg", jpeg(3))
    put(folder / "silent.txt", "\n")
    put(folder / "latin.jpg", jpeg(4))
    put(folder / "latin.txt", "Größe".encode("latin-1"))
    put(folder / ".hidden.jpg", jpeg(5))
    prepare("folder", "--images", folder, "--out", tmp_path / "out")
    assert read(tmp_path / "out") == [
        (jpeg(1), {"caption": "a cat", "image_id": "a cat.jpeg", "source": "a cat.jpeg"}),
        (jpeg(0), {"caption": ["a dog", "the same dog"], "image_id": "b/dog.JPG", "source": "b/dog.JPG"}),
    ]
    assert dropped(tmp_path / "out") == [
        ("alone.jpg", "caption missing"),
        ("latin.jpg", "caption not UTF-8"),
        ("silent.jpg", "caption empty"),
        ("blind.txt", "picture missing"),
    ]


ROWS = [("0.jpg", "a dog, running"), ("0.jpg", 'a "brown" dog'), ("sub/1.jpg", "cats"), ("../2.jpg", "outside")]


@pytest.mark.parametrize("kind", ["csv", "flickr", "tsv", "jsonl", "parquet"])
def test_folder_with_a_table(tmp_path, kind):
    folder = tmp_path / "mine"
    put(folder / "0.jpg", jpeg(0))
    put(folder / "sub/1.jpg", jpeg(1))
    put(tmp_path / "2.jpg", jpeg(2))
    options: list = []
    if kind == "flickr":  # results.csv of Flickr30k
        table = put_csv(tmp_path / "results.csv", [("image_name", " comment"), *ROWS], "|")
        options = ["--table", table, "--delimiter", "|"]
    elif kind in ("csv", "tsv"):
        put_csv(folder / f"metadata.{kind}", [("file_name", "text"), *ROWS], "," if kind == "csv" else "\t")
    elif kind == "jsonl":
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in ROWS]
        put(folder / "metadata.jsonl", "\n".join(["{broken", *lines]))
    else:
        images = [{"bytes": None, "path": name} for name, _ in ROWS] + [{"bytes": jpeg(9), "path": None}]
        captions = [text for _, text in ROWS] + ["inside the table"]
        write_table(pa.table({"image": images, "caption": captions}), folder / "metadata.parquet")
    prepare("folder", "--images", folder, *options, "--out", tmp_path / "out")
    found = [(data, fields["caption"], fields["image_id"]) for data, fields in read(tmp_path / "out")]
    assert found[:3] == [
        (jpeg(0), "a dog, running", "0.jpg"),
        (jpeg(0), 'a "brown" dog', "0.jpg"),
        (jpeg(1), "cats", "sub/1.jpg"),
    ]
    assert [(data, said) for data, said, _ in found[3:]] == [(jpeg(9), "inside the table")] * (kind == "parquet")
    broken = [("metadata.jsonl[0]", "caption missing")] * (kind == "jsonl")
    assert dropped(tmp_path / "out") == [*broken, ("../2.jpg", "picture missing")]


@pytest.mark.parametrize(
    ("source", "arguments", "said"),
    [
        ("albef-json", ["--annotations", "cut.json"], "cut.json is no whole JSON file"),
        ("albef-json", ["--annotations", "object.json"], "object.json is not a JSON list"),
        ("albef-json", ["--annotations", "none.json"], "No such file"),
        ("albef-json", ["--annotations", "list.json", "--replace", "nonsense"], "OLD=NEW"),
        ("coco", ["--annotations", "list.json", "--images", "."], "no list `images`"),
        ("coco", ["--annotations", "object.json", "--images", "nowhere"], "--images nowhere is no folder"),
        ("coco", ["--annotations", "object.json", "--images", "."], "choose one with --split train|val|test"),
        ("coco", ["--annotations", "official.json", "--images", ".", "--split", "val"], "leave --split out"),
        ("folder", ["--images", ".", "--table", "t.csv"], "t.csv has the columns a, b; name one with --image-column"),
        ("folder", ["--images", ".", "--table", "t.xls"], "is none of .csv, .tsv, .jsonl, .parquet"),
        ("folder", ["--images", "empty"], "folder: there is not one picture in --images empty\n"),
        ("img2dataset", ["--shards", "nowhere"], "matches no shards"),
        ("folder", ["--images", ".", "--shard-size", "0"], "--shard-size must be at least 1"),
    ],
)
def test_unusable_input_is_one_clear_line(tmp_path, monkeypatch, capsys, source, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    put(tmp_path / "cut.json", '[{"image": "0.jpg", "caption": "a dog"}, {"image"')
    put(tmp_path / "list.json", [])
    put(tmp_path / "object.json", {"images": [], "dataset": "coco"})
    put(tmp_path / "official.json", {"images": [], "annotations": []})
    put_csv(tmp_path / "t.csv", [("a", "b"), (1, 2)])
    prepare(source, *arguments, "--out", "out", status=2)
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
