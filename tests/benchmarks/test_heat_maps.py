"""The sheet of heat maps: what is wrong with its folders is a line."""

from pathlib import Path

import pytest

from benchmarks import heat_maps


def test_a_folder_that_holds_no_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "sheet.png"
    assert heat_maps.main(["--model", str(tmp_path), "--scenes", str(tmp_path), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said == f"heat_maps: error: {tmp_path} is no model folder: config.json is missing\n"
    assert not out.exists()
