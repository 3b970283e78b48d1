"""The loader's benchmark: its pictures are what it says, and every contender does its work."""

import io
import json

import torch
from PIL import Image

from benchmarks import data


def test_every_contender_makes_normalised_views_of_the_same_pictures(tmp_path):
    pictures = data.make_pictures(640, 480, 2, 2)
    assert [Image.open(io.BytesIO(picture)).size for picture in pictures] == [(640, 480)] * 2
    made = {name: contender() for name, contender in data.contenders(pictures, tmp_path).items()}
    decoded = made.pop(data.LIMIT)
    assert isinstance(decoded, list)
    assert [picture.size for picture in decoded] == [(640, 480)] * 2  # a half would be lower than a view
    for name, views in made.items():
        assert isinstance(views, torch.Tensor)
        assert (views.shape, views.dtype) == ((2, 3, 256, 256), torch.float32), name
        assert -1 < views.mean() < 1, name


def test_results_are_stored_and_printed(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert data.main(["--only", "640", "--pictures", "2", "--repeats", "1", "--json", str(out)]) == 0
    found = json.loads(out.read_text())["pictures"]["640x480"]
    speed = found["pictures_per_second_per_core"]
    assert found["ratio_vs_pil_torchvision"] == speed[data.OURS] / speed[data.OFFICIAL]
    assert f"| {data.OURS} | {speed[data.OURS]:.0f} |" in capsys.readouterr().out
