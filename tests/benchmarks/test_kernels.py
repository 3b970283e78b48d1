"""`python -m benchmarks kernels`: what it refuses before it measures anything."""

import pytest

from benchmarks import kernels
from benchmarks.__main__ import main


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--only", "zzz"], "--only zzz: in none of cross_attention: text over image (30 x 257); "),
        (["--only", "XMM", "--write"], "leave --only out"),
    ],
)
def test_a_selection_that_makes_no_sense_is_status_2(monkeypatch, capsys, argv, told):
    monkeypatch.setattr(kernels, "measure", lambda *_: pytest.fail("nothing must be measured"))
    with pytest.raises(SystemExit) as exit:
        kernels.main(argv)
    assert exit.value.code == 2
    assert told in capsys.readouterr().err


def test_a_benchmark_that_is_not_there_is_told_by_name(capsys):
    assert main(["kernel"]) == 2
    out, err = capsys.readouterr()
    assert "there is no benchmark called kernel" in err
    assert "kernels" in out
