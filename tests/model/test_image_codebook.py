"""DALL-E's published encoder.pkl, a whole pickled module, becomes a visual tokeniser without running what it holds.

The real file cannot be had here. A process of its own pickles modules of the same class names, module tree, parameter
names and saved attributes, in the same file format, only narrower; it also says what they compute.
"""

import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from simla_ds.cli import main
from simla_ds.data.visual_tokens import DalleTokens, load_visual_tokenizer
from simla_ds.model.weight_files import read_weights

GRID = 4
DALL_E = {
    "utils": """
        import torch
        from torch import nn
        from torch.nn import functional as F
        class Conv2d(nn.Module):
            def __init__(self, n_in, n_out, kw, use_float16=True):
                super().__init__()
                self.n_in, self.n_out, self.kw, self.use_float16 = n_in, n_out, kw, use_float16
                self.device, self.requires_grad = torch.device("cpu"), False
                self.w = nn.Parameter(torch.randn(n_out, n_in, kw, kw) * (n_in * kw * kw) ** -0.5)
                self.b = nn.Parameter(0.3 * torch.randn(n_out))
            def forward(self, x):
                return F.conv2d(x, self.w, self.b, padding=self.kw // 2)
    """,
    "encoder": """
        from collections import OrderedDict
        import torch
        from torch import nn
        from dall_e.utils import Conv2d
        class EncoderBlock(nn.Module):
            def __init__(self, n_in, n_out, n_layers):
                super().__init__()
                self.n_in, self.n_out, self.n_layers, self.n_hid = n_in, n_out, n_layers, n_out // 4
                self.post_gain = 1 / n_layers**2
                self.id_path = nn.Identity() if n_in == n_out else Conv2d(n_in, n_out, 1)
                widths = [n_in, *[self.n_hid] * 3, n_out]
                path = OrderedDict()
                for i in range(4):
                    path[f"relu_{i + 1}"] = nn.ReLU()
                    path[f"conv_{i + 1}"] = Conv2d(widths[i], widths[i + 1], 3 if i < 3 else 1)
                self.res_path = nn.Sequential(path)
            def forward(self, x):
                return self.id_path(x) + self.post_gain * self.res_path(x)
        class Encoder(nn.Module):
            group_count = 4
            def __init__(self, n_hid, vocab_size, n_blk_per_group=2):
                super().__init__()
                self.n_hid, self.n_blk_per_group, self.vocab_size = n_hid, n_blk_per_group, vocab_size
                self.device, self.use_mixed_precision = torch.device("cpu"), True
                blocks, width = OrderedDict(input=Conv2d(3, n_hid, 7)), n_hid
                for group in range(4):
                    inner = OrderedDict()
                    for block in range(n_blk_per_group):
                        inner[f"block_{block + 1}"] = EncoderBlock(width, n_hid * 2**group, 4 * n_blk_per_group)
                        width = n_hid * 2**group
                    if group < 3:
                        inner["pool"] = nn.MaxPool2d(kernel_size=2)
                    blocks[f"group_{group + 1}"] = nn.Sequential(inner)
                output = OrderedDict(relu=nn.ReLU(), conv=Conv2d(width, vocab_size, 1, use_float16=False))
                blocks["output"] = nn.Sequential(output)
                self.blocks = nn.Sequential(blocks)
            def forward(self, x):
                return self.blocks(x)
    """,
}
SCRIPT = """
    import torch
    from dall_e.encoder import Encoder
    from safetensors.torch import save_file
    torch.manual_seed(0)
    encoder, view = Encoder(8, 64), torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        encoder.blocks.output.conv.b -= encoder(view).mean((0, 2, 3))  # or one random code would win everywhere
        ids = encoder(0.8 * view + 0.1).argmax(1).flatten(1)
    torch.save(encoder, "encoder.pkl")
    torch.save(encoder, "old.pkl", _use_new_zipfile_serialization=False)
    torch.save(encoder.state_dict(), "state.pth")
    save_file(encoder.state_dict(), "state.safetensors")
    save_file({"view": view, "ids": ids}, "expected.safetensors")
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    (folder / "dall_e").mkdir()
    for name, text in {"__init__": "", **DALL_E}.items():
        (folder / "dall_e" / f"{name}.py").write_text(textwrap.dedent(text))
    (folder / "make.py").write_text(textwrap.dedent(SCRIPT))
    subprocess.run([sys.executable, "make.py"], cwd=folder, check=True, env={**os.environ, "PYTHONPATH": str(folder)})
    return folder


def call(source, out, *options):
    return main(["import", str(source), "--out", str(out), *options])


@pytest.mark.parametrize("name", ["encoder.pkl", "state.pth", "state.safetensors"])
def test_the_tokens_are_those_of_the_pickled_encoder(published, name, tmp_path, capsys):
    assert call(published / name, tmp_path / "out") == 0
    assert "74 of 74 parameters loaded" in capsys.readouterr().out
    assert "dall_e" not in sys.modules
    tokenizer = load_visual_tokenizer(tmp_path / "out", GRID)
    assert isinstance(tokenizer, DalleTokens)
    assert (tokenizer.view_size, tokenizer.vocabulary_size) == (32, 64)
    expected = load_file(published / "expected.safetensors")
    assert expected["ids"].unique().numel() > 10  # else equal codes would say little
    assert torch.equal(tokenizer(expected["view"]), expected["ids"])


def test_the_modules_parameters_are_read_bit_for_bit(published):
    read, saved = read_weights(published / "encoder.pkl"), load_file(published / "state.safetensors")
    assert list(read) == list(torch.load(published / "state.pth", weights_only=True))
    assert all(torch.equal(read[name], value) for name, value in saved.items())


class Evil:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def hidden(evil: Evil) -> Any:
    """An encoder as it is published, with something else among its modules."""
    encoder = sys.modules["dall_e.encoder"].Encoder()
    encoder._parameters, encoder._modules = {}, {"blocks": evil}
    return encoder


@pytest.mark.parametrize("wrap", [lambda evil: evil, hidden, lambda evil: {"blocks.input.w": evil}])
def test_a_pickle_that_would_make_a_folder_is_refused_in_one_line(wrap, tmp_path, capsys, monkeypatch):
    module = ModuleType("dall_e.encoder")
    vars(module)["Encoder"] = type("Encoder", (), {"__module__": module.__name__})
    for name in ("dall_e", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)  # where pickle looks it up
    torch.save(wrap(Evil(tmp_path / "made")), tmp_path / "encoder.pkl")
    assert call(tmp_path / "encoder.pkl", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "is refused: besides tensors it holds posix.mkdir" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "out").exists()
    torch.load(tmp_path / "encoder.pkl", weights_only=False)
    assert (tmp_path / "made").exists(), "it does no harm anywhere, so that refusing it shows nothing"


def test_modules_pickled_with_their_source_are_refused_with_what_to_do(published, tmp_path, capsys):
    assert call(published / "old.pkl", tmp_path / "out") == 2
    assert "old.pkl is refused: its modules are pickled as torch before 1.6 did" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda w: w.pop("blocks.group_2.block_1.id_path.w"), "lacks blocks.group_2.group.block_1"),
        (lambda w: w.pop("blocks.output.conv.w"), "but no blocks.output.conv.w"),
        (lambda w: w.update(more=torch.zeros(1)), "holds more, which the encoder of a dVAE doesn't have"),
        (
            lambda w: w.update({"blocks.output.conv.w": torch.zeros(64, 60, 1, 1)}),
            "conv.weight is (64, 60, 1, 1), which does not go with blocks.input.w (8, 3, 7, 7): it should be (64, 64,",
        ),
    ],
)
def test_parameters_that_do_not_make_an_encoder_are_refused_in_one_line(harm, said, published, tmp_path, capsys):
    weights = load_file(published / "state.safetensors")
    harm(weights)
    save_file(weights, tmp_path / "a.safetensors")
    assert call(tmp_path / "a.safetensors", tmp_path / "out") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_models_options_do_not_apply(published, tmp_path, capsys):
    assert call(published / "encoder.pkl", tmp_path / "out", "--heads", "4") == 2
    assert "takes no --tokenizer, --image-size or --heads" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\x80\x02.", pickle.dumps({"a": 1}, 2), b"<?xml version='1.0'?>"])
def test_a_file_that_is_no_checkpoint_is_one_line(content, tmp_path, capsys):
    (tmp_path / "encoder.pkl").write_bytes(content)
    assert call(tmp_path / "encoder.pkl", tmp_path / "out") == 2
    assert "cannot be read as weights" in capsys.readouterr().err
