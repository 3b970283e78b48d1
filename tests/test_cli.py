"""The console command: what each subcommand passes on, and its exit status."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from simla_ds.cli import main


@pytest.fixture
def library(monkeypatch):
    """Stand in for the library's functions: record the call, then return or raise what the test says."""
    record = SimpleNamespace(calls=[], result=None, error=None)

    def function(*args, **kwargs):
        record.calls.append((args, kwargs))
        if record.error is not None:
            raise record.error
        return record.result

    for module, name in (
        ("simla_ds.data.scenes.prepare", "prepare_scenes"),
        ("simla_ds.verify", "verify_reference"),
        ("simla_ds.demo", "run_demo"),
    ):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: function}))
    return record


def test_prepare_scenes_passes_its_options_on(library):
    assert main(["prepare", "scenes", "--out", "x", "--train", "80", "--seed", "2", "--workers", "1"]) == 0
    assert library.calls == [((Path("x"),), {"train": 80, "seed": 2, "size": 128, "workers": 1})]


def test_prepare_scenes_defaults(library):
    main(["prepare", "scenes", "--out", "x"])
    assert library.calls == [((Path("x"),), {"train": 20_000, "seed": 0, "size": 128, "workers": None})]


@pytest.mark.parametrize(("agrees", "status"), [(True, 0), (False, 1)])
def test_verify_ends_with_0_only_within_tolerance(library, agrees, status):
    library.result = agrees
    assert main(["verify", "--reference", "r", "--json", "o.json", "--loss-tolerance", "1e-6"]) == status
    expected = {"loss_tolerance": 1e-6, "tolerance": 1e-4, "passes": "fast", "json_out": Path("o.json")}
    assert library.calls == [((Path("r"),), expected)]


@pytest.mark.parametrize("status", [0, 1])
def test_demo_ends_as_the_demo_ended(library, status):
    library.result = status
    assert main(["demo", "--out", "d", "--seed", "3"]) == status
    assert library.calls == [((Path("d"), 3), {})]


@pytest.mark.parametrize(
    "error",
    [ValueError("size is 3;\n  set it to 4"), FileNotFoundError(2, "No such file", "x"), OSError(28, "No space left")],
)
def test_bad_input_is_one_line_and_status_2(library, capsys, error):
    library.error = error
    assert main(["verify", "--reference", "r"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"simla: error: {' '.join(str(error).split())}\n"


def test_a_bug_keeps_its_traceback(library):
    library.error = TypeError("a bug")
    with pytest.raises(TypeError, match="a bug"):
        main(["verify", "--reference", "r"])


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["verfy"],
        ["prepare"],
        ["prepare", "scenes"],
        ["prepare", "scenes", "--out", "x", "--train", "0"],
        ["verify", "--reference", "r", "--tol", "1"],  # no abbreviations
    ],
)
def test_wrong_use_is_status_2(library, argv):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    assert library.calls == []


@pytest.mark.parametrize("given", ["abc", "0", "1.5"])
def test_a_number_that_is_none_is_told_in_words(capsys, given):
    with pytest.raises(SystemExit):
        main(["prepare", "scenes", "--out", "x", "--train", given])
    assert f"argument --train: must be a whole number above 0, got '{given}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [[], ["prepare"], ["prepare", "scenes"], ["prepare", "coco"], ["inspect"], ["verify"], ["demo"]],
)
def test_every_command_has_help_with_defaults(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*argv, "--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0
    assert not re.search(r"default: (None|False|\(\)|\))", text)
    if not argv:
        assert all(name in text for name in ("launch/pretrain.py", "launch/finetune.py", "launch/evaluate.py"))
    if argv == ["prepare", "scenes"]:
        assert all(default in text for default in ("20000", "128", "PIXELS"))


def test_help_is_instant_because_it_imports_nothing_heavy():
    script = (
        "import sys; from simla_ds.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'numpy', 'transformers', 'jsonargparse'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
