"""Safetensors written as a stream, and tensors in pieces: no ranks, no DeepSpeed."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from simla_ds.engine.checkpoint_folder import describe_file
from simla_ds.engine.tensor_files import Piece, Pieces, write_index, write_pieces, write_tensors

WHOLE = {"a/weight": torch.randn(7, 3), "b/weight": torch.randn(5), "b/empty": torch.zeros(0, 4)}


def cut(bounds: list[int]) -> list[list[Piece]]:
    """Return each rank's pieces, every tensor cut at the given thousandths."""
    ranks = []
    for low, high in zip([0, *bounds], [*bounds, 1000], strict=True):
        pieces = []
        for name, value in WHOLE.items():
            start, end = value.numel() * low // 1000, value.numel() * high // 1000
            pieces.append(Piece(name, tuple(value.shape), start, value.flatten()[start:end]))
        ranks.append(pieces)
    return ranks


def test_a_streamed_file_is_a_safetensors_file(tmp_path):
    path = tmp_path / "x.safetensors"
    shapes = {name: tuple(value.shape) for name, value in WHOLE.items()}
    entry = write_tensors(path, shapes, WHOLE.__getitem__, metadata={"format": "pt"})
    assert entry == describe_file(path)
    assert all(torch.equal(value, WHOLE[name]) for name, value in load_file(path).items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    with pytest.raises(ValueError, match=r"announced as \(8,\)"):
        write_tensors(path, {"b/weight": (8,)}, WHOLE.__getitem__)


@pytest.mark.parametrize("bounds", [[], [500], [10, 20, 990]])  # one rank; halves; shares of a few elements and none
def test_any_range_can_be_read_whoever_wrote_it(tmp_path, bounds):
    write_index(tmp_path, [write_pieces(tmp_path, rank, pieces) for rank, pieces in enumerate(cut(bounds))])
    pieces = Pieces(tmp_path)
    assert pieces.keys() == WHOLE.keys()
    for name, value in WHOLE.items():
        assert torch.equal(pieces[name], value)
        for start in range(value.numel()):
            for end in range(start, value.numel() + 1):
                assert torch.equal(pieces.read(name, start, end - start), value.flatten()[start:end])
    assert list(Pieces(tmp_path, "a/")) == ["weight"]


@pytest.mark.parametrize("ranks", [[0], [0, 0, 1]], ids=["a share is missing", "a share is there twice"])
def test_pieces_that_do_not_make_the_whole_once_are_refused(tmp_path, ranks):
    shares = cut([500])
    with pytest.raises(RuntimeError, match=r"a/weight"):
        write_index(tmp_path, [write_pieces(tmp_path, number, shares[rank]) for number, rank in enumerate(ranks)])
