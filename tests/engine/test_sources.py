"""Several data sets in one run, through the real launcher: who had which share, whose loss is whose."""

import shutil

import pytest

from tests.engine.launching import ROOT, launch
from tests.engine.runs import keys, records, scenes

pytestmark = pytest.mark.launcher

RUN = ["--train.steps", "6", "--train.batch_size", "4", "--train.grad_accumulation", "2", "--deepspeed"]
RUN += [str(ROOT / "ds_configs" / "zero3.json")]  # heads' weights are whole within a forward only


def test_a_mixed_run_logs_every_sources_share_and_losses(tmp_path):
    train = scenes(tmp_path)
    other = train.parent / "other"
    shutil.copytree(train, other)
    recipe, run = tmp_path / "mixed.yaml", tmp_path / "run"
    recipe.write_text(
        f"data: {{sources: {{first: {{shards: {train}, weight: 3}}, other: {{shards: {other}, weight: 1}}}}}}"
    )
    arguments = [word for word in keys(train, *RUN) if word not in ("--data.train", str(train))]
    done = launch("launch/pretrain.py", "--config", str(recipe), *arguments, "--output", str(run), ranks=2, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [record for record in records(run) if "loss" in record]
    assert len(lines) == 6
    shares = {"first": [], "other": []}
    for line in lines:
        assert 0 <= line["data_wait_share"] < 1
        for source, found in shares.items():
            found.append(line[f"source/{source}/share"])
        assert sum(line[f"source/{source}/share"] for source in shares) == pytest.approx(1)
        for name in ("itc", "psl"):  # a row per pair: the batch's loss is the mean by shares
            mean = sum(
                line[f"source/{source}/share"] * line.get(f"source/{source}/loss/{name}", 0.0) for source in shares
            )
            assert mean == pytest.approx(line[f"loss/{name}"], rel=1e-4)
        assert {f"source/first/loss/{name}" for name in ("itm", "mlm", "xmm")} <= line.keys()
    assert sum(shares["first"]) / 6 == pytest.approx(0.75, abs=0.12)
