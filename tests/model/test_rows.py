"""Rows without padding: where their tokens stand, and attention among them against each row by itself in float64."""

import pytest
import torch
from torch import Tensor

from simla_ds.model import rows as rows_module
from simla_ds.model.rows import Rows, attend, first_attention
from simla_kernels import cross_attention_reference

LENGTHS, WIDTH, HEADS, SIZE = [3, 1, 5], 6, 2, 4  # one row of [CLS] alone, none that fills the width


def make_rows(lengths: list[int] = LENGTHS, width: int = WIDTH, *, padded: bool = False) -> Rows:
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return Rows.of(mask, None if padded else mask.flatten().nonzero()[:, 0])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_packing_and_padding_undo_each_other_and_leave_zeros():
    rows, x = make_rows(), random(3, WIDTH, 2)
    packed = rows.pack(x)
    assert torch.equal(packed, torch.cat([x[0, :3], x[1, :1], x[2, :5]]))
    assert rows.mask is not None
    assert torch.equal(rows.pad(packed), x.masked_fill(~rows.mask[..., None], 0.0))
    assert rows.total == 9
    everything = make_rows(padded=True)
    assert torch.equal(everything.pad(everything.pack(x)), x)
    assert everything.total == 18


def test_slots_first_tokens_and_positions_are_found_in_packed_and_padded_rows():
    flat = torch.tensor([0, 2, 6, 14])  # (row 0, tokens 0 and 2), (row 1, token 0), (row 2, token 2)
    for rows in (make_rows(), make_rows(padded=True)):
        positions = torch.arange(WIDTH).repeat(3)
        assert torch.equal(rows.pack(positions.view(3, WIDTH))[rows.slots(flat)], torch.tensor([0, 2, 0, 2]))
        assert torch.equal(rows.positions(flat.device), rows.pack(positions.view(3, WIDTH)))
        assert torch.equal(rows.positions(flat.device)[rows.first(flat.device)], torch.zeros(3, dtype=torch.long))
    assert make_rows().slots(flat).tolist() == [0, 2, 3, 6]
    assert make_rows().first(flat.device).tolist() == [0, 3, 4]


def test_joined_rows_hold_the_tokens_of_all_parts_in_order():
    parts = [make_rows(), make_rows([2, 6], padded=True), make_rows([4])]
    xs = [random(part.count, WIDTH, 2, seed=i) for i, part in enumerate(parts)]
    joined = Rows.join(parts)
    assert (joined.count, joined.width, joined.total) == (6, WIDTH, 9 + 12 + 4)
    packed = torch.cat([part.pack(x) for part, x in zip(parts, xs, strict=True)])
    assert torch.equal(joined.pack(torch.cat(xs)), packed)
    assert joined.mask is not None
    assert joined.mask.sum(1).tolist() == [3, 1, 5, 2, 6, 4]
    assert Rows.join([Rows(2, 4), Rows(3, 4)]) == Rows(5, 4)


@pytest.fixture(params=["padded", "by length"])
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attend as on a CPU, and as on a card (there by cross_attention_varlen's PyTorch path)."""
    monkeypatch.setattr(rows_module, "_by_length", lambda *_: request.param == "by length")


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("padded", [False, True])
def test_attention_of_packed_rows_is_that_of_each_row_by_itself(padded: bool):
    """Rows read their own tokens, or another row's; padding that is kept is never read."""
    rows = make_rows(padded=padded)
    x = [random(3, WIDTH, HEADS, SIZE, seed=i) for i in range(3)]
    packed_q, packed_k, packed_v = (rows.pack(part) for part in x)
    key_row = torch.tensor([2, 2, 0])
    for picked in (None, key_row):
        out = rows.pad(attend(packed_q, packed_k, packed_v, rows, rows, picked))
        for r, length in enumerate(LENGTHS):
            other = r if picked is None else int(picked[r])
            q, k, v = (part[i : i + 1].transpose(1, 2) for part, i in zip(x, (r, other, other), strict=True))
            k, v = k[:, :, : LENGTHS[other]], v[:, :, : LENGTHS[other]]
            wanted, _ = cross_attention_reference(q[:, :, :length], k, v, return_cls_row=True)
            torch.testing.assert_close(out[r, :length].transpose(0, 1), wanted[0], atol=1e-6, rtol=0)


@pytest.mark.usefixtures("attention")
def test_tokens_that_ask_alone_get_what_they_get_among_all():
    rows, x = make_rows(), [random(9, HEADS, SIZE, seed=i) for i in range(3)]
    slots = torch.tensor([0, 2, 5, 8])  # none of row 1
    some = attend(x[0][slots], x[1], x[2], rows.take(slots), rows)
    torch.testing.assert_close(some, attend(x[0], x[1], x[2], rows, rows)[slots], atol=1e-6, rtol=0)
    nobody = torch.empty(0, dtype=torch.long)
    assert attend(x[0][nobody], x[1], x[2], rows.take(nobody), rows).shape == (0, HEADS, SIZE)


def test_by_length_hidden_tokens_get_no_gradient_and_others_the_same_as_padded(monkeypatch: pytest.MonkeyPatch):
    rows = Rows.join([make_rows(), make_rows([2, 6], padded=True)])  # packed, and two rows with hidden slots
    made = []
    for by_length in (False, True):
        monkeypatch.setattr(rows_module, "_by_length", lambda *_, by_length=by_length: by_length)
        x = [random(rows.total, HEADS, SIZE, seed=i).requires_grad_() for i in range(3)]
        out = attend(x[0], x[1], x[2], rows, rows, torch.tensor([3, 3, 0, 4, 1]))
        made.append([out, *torch.autograd.grad(out, x, random(*out.shape, seed=9))])
    for by_length, padded in zip(made[1], made[0], strict=True):
        torch.testing.assert_close(by_length, padded, atol=1e-9, rtol=0)
    assert not made[1][2][11:15].any()  # row 3 has 2 of 6 slots visible
    assert made[1][2][9:11].all()


def test_the_first_tokens_attention_is_zero_at_padding_and_sums_to_one():
    rows, q, k = make_rows(), random(9, HEADS, SIZE), random(9, HEADS, SIZE, seed=1)
    attention = first_attention(q[rows.first(q.device)], k, rows)
    assert attention.shape == (3, HEADS, WIDTH)
    assert rows.mask is not None
    assert not attention.transpose(1, 2)[~rows.mask].any()
    torch.testing.assert_close(attention.sum(-1), torch.ones(3, HEADS), atol=1e-6, rtol=0)
    padded = rows.pad(k).transpose(1, 2)
    asking = rows.pad(q).transpose(1, 2)
    _, wanted = cross_attention_reference(asking, padded, padded, rows.mask, return_cls_row=True)
    torch.testing.assert_close(attention.double(), wanted, atol=1e-6, rtol=0)
