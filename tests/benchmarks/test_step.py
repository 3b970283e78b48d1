"""What the step benchmark counts, times and sums up, at a size where it takes a second."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import step, step_process
from benchmarks.agreement import SAME_ARITHMETIC
from benchmarks.command import conclude, new_result
from benchmarks.counting import saved_for_backward
from benchmarks.step_contenders import BUILD, FusedAdamW, Ours, Published
from benchmarks.step_process import count, count_bytes, loss_difference, time_parts, time_step, warm_up
from benchmarks.step_sizes import SIZES, changed, make_batch, with_negatives
from benchmarks.timing import CPU, Clock, environment
from simla_kernels import dispatch

TINY = changed(SIZES["tiny"], model__stream__layers=2)


@pytest.mark.parametrize("name", ["ours", "official order"])
def test_a_step_trains_and_its_parts_make_up_its_time(name: str):
    contender, batch = BUILD[name](TINY, torch.float32, CPU), make_batch(TINY)
    before = [p.detach().clone() for p in contender.networks[0].parameters()]
    clock, parts = Clock(), dict[str, float]()
    seconds = Clock().time(lambda: parts.update(time_parts(contender, batch, clock)["seconds_by_part"]))
    assert any(not torch.equal(p, old) for p, old in zip(contender.networks[0].parameters(), before, strict=True))
    whole = sum(parts[part] for part in ("forward", "backward", "AdamW", "queue and teacher"))
    assert 0.8 * seconds <= whole <= seconds


def test_ours_saves_less_than_the_official_order_and_less_still_when_checkpointing():
    batch = make_batch(TINY)
    ours, official = (count_bytes(BUILD[name](TINY, torch.float32, CPU), batch) for name in ("ours", "official order"))
    assert ours["saved_bytes"] < 0.6 * official["saved_bytes"]
    assert ours["saved_bytes_checkpointed"] < 0.6 * ours["saved_bytes"]  # two layers: most of it is the heads'


def test_both_orders_have_the_same_losses():
    assert loss_difference(TINY, make_batch(TINY)) < 1e-5


def test_a_storage_counts_once_and_parameters_do_not():
    layer, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
    with saved_for_backward(layer) as saved:
        y = layer(x) * layer(x)  # x once; the two products; the weight not at all
    assert saved[0] == 3 * x.nbytes
    assert y.requires_grad


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", list(BUILD))
def test_everything_that_a_step_touches_is_on_its_device(name: str, device: str):
    where = torch.device(device)
    contender: Any = BUILD[name](TINY, torch.bfloat16, where)
    batch = make_batch(TINY, device=where)
    tensors: list[Any] = [*batch.values(), *with_negatives(batch).values()]
    for network in contender.networks:
        tensors += [*network.parameters(), *network.buffers()]
    if isinstance(contender, (Ours, Published)):
        queue, teacher = contender.task.queue, contender.task.teacher
        tensors += [*queue.keys(), *teacher.master.values()]
    if isinstance(contender, Published):
        tensors += [contender.order.image_queue, contender.order.text_queue]
    if device == "cuda":
        warm_up(contender, batch)
        optimizer = contender.optimizer.inner if isinstance(contender.optimizer, FusedAdamW) else contender.optimizer
        tensors += [m for state in optimizer.state.values() for name, m in state.items() if name != "step"]
        assert environment(where)["device"] == torch.cuda.get_device_name()
    assert {t.device.type for t in tensors} == {device}


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(BUILD))
def test_a_card_counts_the_operations_that_a_cpu_counts(name: str):
    counted = []
    for device in (CPU, torch.device("cuda")):
        contender = BUILD[name](TINY, torch.float32, device)
        counted.append(count(contender, make_batch(TINY, device=device))["operations"])
    assert counted[1] == pytest.approx(counted[0], rel=0.05)  # SDPA's backends differ


@pytest.mark.gpu
def test_both_orders_have_the_same_losses_on_a_card():
    assert loss_difference(TINY, make_batch(TINY, device=torch.device("cuda"))) < SAME_ARITHMETIC


def test_operations_are_counted_where_they_are_pytorchs_own(monkeypatch: pytest.MonkeyPatch):
    contender, asked = BUILD["ours"](TINY, torch.float32, CPU), set()
    monkeypatch.setattr(contender, "step", lambda batch: asked.add(dispatch._forced))
    count(contender, make_batch(TINY))
    assert asked == {"torch"}
    assert dispatch._forced is None


def test_a_whole_step_is_timed_without_clocks_inside(monkeypatch: pytest.MonkeyPatch):
    contender, batch, clock = BUILD["ours"](TINY, torch.float32, CPU), make_batch(TINY), Clock()
    assert time_step(contender, batch, clock)["seconds"] > 0
    assert not clock.parts


def test_a_product_is_probed_in_the_dtype_that_a_contender_multiplies_in(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(step_process.PROBE, "cpu", (8, 8, 8))
    multiplied, product = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: multiplied.append(a.dtype) or product(a, b))
    monkeypatch.setattr(Published, "step", lambda self, batch: None)
    batch = make_batch(TINY)
    for name, dtype in (("official order", torch.float32), ("official order, autocast bf16", torch.bfloat16)):
        multiplied.clear()
        time_step(BUILD[name](TINY, torch.bfloat16, CPU), batch, Clock())
        assert set(multiplied) == {dtype}


def answers(seconds: float, operations: float, saved: int, rate: float = 100.0) -> dict[str, Any]:
    timed = {"seconds": seconds, "peak_memory_mb": 10.0, "gemm_gflops": [rate, rate]}
    return {
        "bytes": {"saved_bytes": saved, "saved_bytes_checkpointed": saved // 10},
        "count": {"operations": operations, "computes": ""},
        "parts": {"seconds_by_part": {"forward": seconds}},
        "step": [timed, {**timed, "seconds": 1e3}, timed],
    }


def test_ratios_are_of_medians_and_useful_work_is_ours():
    rows = {"ours": answers(2.0, 100e9, 100), "official order": answers(3.0, 240e9, 300), "FLAVA": answers(1.0, 5e9, 7)}
    result = step.summarise(rows, pairs=4)
    assert result["ratio_vs_official_order"] == pytest.approx(1.5)
    assert result["ratio_vs_flava"] == pytest.approx(0.5)
    assert result["ratio_vs_official_order_autocast"] is None
    assert result["useful_share_of_gemm"] == pytest.approx(0.5)
    assert (result["saved_bytes"], result["saved_bytes_official_order"]) == (100, 300)
    assert result["times_fewer_saved_bytes_checkpointed"] == pytest.approx(30)
    assert result["contenders"]["ours"]["pairs_per_second"] == pytest.approx(2)


def test_a_share_is_of_the_rate_that_the_same_contender_measured():
    rows = {
        "ours": answers(1.0, 100e9, 10, rate=400.0),
        "official order": answers(1.0, 50e9, 10),
        "FLAVA": answers(1.0, 1e9, 10),
    }
    contenders = step.summarise(rows, pairs=4)["contenders"]
    assert [contenders[name]["share_of_gemm"] for name in ("ours", "official order")] == pytest.approx([0.25, 0.5])


class Ended:
    """A process that measured an agreement and is done."""

    def __init__(self, *_: Any):
        self.process = self

    def communicate(self) -> tuple[str]:
        return ('{"loss_difference": 0.0}',)


@pytest.mark.parametrize(
    ("baseline", "control", "slower", "accused"),
    [
        (9.0, 2.0, 1.253, True),  # the control is faster than published: the baseline is judged as it stands
        (9.0, 2.4, 1.231, True),
        (9.0, 3.0, 0.985, False),  # the machine is slower than its products tell: so is the control
        (8.0, 2.0, 1.113, False),
    ],
)
def test_a_baseline_slower_than_published_is_an_error(baseline, control, slower, accused, capsys):
    rows = {
        "ours": answers(2.0, 100e9, 100),
        "official order": answers(baseline, 435e9, 300),
        "FLAVA": answers(control, 160e9, 7),
    }
    result = new_result("step", config="small", precision="fp32", pairs=16, clock="wall", note="", loss_difference=0.0)
    result |= step.summarise(rows, pairs=16)
    result |= step.straw_man(result["contenders"], step.PUBLISHED["small"])
    assert result["baseline_slower"] == pytest.approx(slower, abs=1e-3)
    result["objections"] = step.objections(result)
    assert conclude(result, step.describe(result), None) == (1 if accused else 0)
    printed = capsys.readouterr()
    assert f"unchanged code: {slower:.2f} times" in printed.out
    assert ("mend it" in printed.err) == accused


def test_the_baseline_is_judged_as_it_was_published_by_its_fastest_step_and_the_fastest_product():
    rows = {"official order": answers(8.0, 435e9, 300), "FLAVA": answers(2.0, 160e9, 7), "ours": answers(2.0, 1e9, 10)}
    usual = step.straw_man(step.summarise(rows, pairs=16)["contenders"], step.PUBLISHED["small"])
    rows["official order"]["step"][0] = {**rows["official order"]["step"][0], "seconds": 6.0}
    rows["ours"]["step"][2] = {**rows["ours"]["step"][2], "gemm_gflops": [100.0, 120.0]}  # a quiet moment
    found = step.straw_man(step.summarise(rows, pairs=16)["contenders"], step.PUBLISHED["small"])
    changed = 6 / 8 * 1.2
    assert found["slower_than_published"]["official order"] == pytest.approx(
        changed * usual["slower_than_published"]["official order"]
    )


def test_beside_a_control_in_bf16_the_baseline_is_told_by_its_own_rate_and_not_judged(monkeypatch, capsys):
    rows = {"ours": answers(2.0, 100e9, 100, rate=900.0), "FLAVA": answers(1.0, 160e9, 7, rate=900.0)}
    rows |= {name: answers(90.0, 435e9, 300) for name in ("official order", "official order, autocast bf16")}
    monkeypatch.setattr(step, "ContenderProcess", Ended)
    monkeypatch.setattr(step, "take_turns", lambda *_, **__: rows)
    monkeypatch.setattr(step, "has_bf16_units", lambda: True)
    result = step.run("small", "bf16", 1, "wall", CPU)
    assert conclude(result, step.describe(result), None) == 0
    seconds, gflop = step.PUBLISHED["small"]["official order"][1], 435.0
    expected = gflop / seconds / step.PUBLISHED_RATE / (gflop / 90.0 / 100.0)
    assert result["slower_than_published"] == {"official order": pytest.approx(expected)}
    assert f"official order {expected:.2f}\n" in capsys.readouterr().out


@pytest.mark.parametrize("difference", [2e-4, float("nan")])
def test_orders_that_disagree_are_an_error(difference: float):
    assert "a loss of ours in official fidelity differs" in step.objections({"loss_difference": difference})[0]
    assert not step.objections({"loss_difference": 5e-5})


@pytest.mark.parametrize(("size", "device"), [("tiny", "cpu"), ("small", "cuda")])
def test_what_was_published_on_a_cpu_says_nothing_of_other_sizes_and_devices(size, device, monkeypatch):
    rows = {name: answers(9.0, 435e9, 300) for name in ("ours", "official order")} | {"FLAVA": answers(2.0, 160e9, 7)}
    monkeypatch.setattr(step, "ContenderProcess", Ended)
    monkeypatch.setattr(step, "take_turns", lambda *_, **__: rows)
    monkeypatch.setattr(step, "environment", lambda device: {})
    assert "baseline_slower" not in step.run(size, "fp32", 1, "wall", torch.device(device))
    assert step.run("small", "fp32", 1, "wall", CPU)["objections"]


@pytest.mark.slow
def test_contenders_take_turns_in_processes_of_their_own(tmp_path: Path):
    out = tmp_path / "step.json"
    assert step.main(["--config", "tiny", "--device", "cpu", "--repeats", "2", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert {len(c["seconds"]) for c in result["contenders"].values()} == {2}
    assert result["loss_difference"] < 1e-5
    assert result["environment"]["device"] == "cpu"
