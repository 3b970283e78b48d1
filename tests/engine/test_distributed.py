"""Starting and ending ranks under the real launcher."""

import json
import os
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from simla_ds.engine import distributed
from simla_ds.engine.distributed import finish, start
from tests.engine.launching import launch


@pytest.fixture(scope="module")
def done():
    return launch("tests.engine.workers.start", ranks=2)


@pytest.mark.launcher
def test_an_error_is_said_once_whichever_rank_has_it(done):
    lines = sorted(line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert len(lines) == 2, done.stderr[-3000:]
    assert lines[0].startswith("error: of one (rank 1, ")
    assert lines[1].startswith("error: the same on both")


@pytest.mark.launcher
def test_no_operator_is_compiled_and_nothing_lies_in_shared_memory(done):
    said = next((json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")), None)
    assert said, done.stderr[-3000:]
    assert said == {"mapped": [[], []], "compiled": [[], []]}


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_several_processes_without_ranks_are_refused(monkeypatch, name):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(name, "4")
    with pytest.raises(ValueError, match=rf"{name}=4, but RANK is not set: start one `deepspeed` launcher per node"):
        start()


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({"MASTER_ADDR": "127.0.0.1"}, "lo"),
        ({"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "ib0"}, "ib0"),
        ({"MASTER_ADDR": "no.such.host.invalid"}, None),
    ],
)
def test_gloo_listens_on_the_way_to_the_first_node_unless_told(monkeypatch, environ, wanted):
    monkeypatch.setattr(os, "environ", dict(environ))
    distributed._settle_gloo_interface()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == wanted


NODES = {"MASTER_ADDR": "node0", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        (NODES, "eth9"),  # loopback to itself, and the other nodes are not here
        ({**NODES, "LOCAL_SIZE": "4"}, "lo"),
        ({**NODES, "LOCAL_WORLD_SIZE": "2", "LOCAL_SIZE": ""}, "eth9"),
        ({**NODES, "MASTER_ADDR": "127.0.0.1"}, "lo"),  # "nodes" of one machine
    ],
)
def test_the_first_node_does_not_listen_on_loopback_when_there_are_others(monkeypatch, environ, wanted):
    """The host's interfaces are made up: this machine has one node."""
    ways = {"node0": "127.0.1.1", "127.0.0.1": "127.0.1.1", distributed.ELSEWHERE: "10.0.0.7"}
    addresses = {"lo": [SimpleNamespace(address="127.0.1.1")], "eth9": [SimpleNamespace(address="10.0.0.7")]}
    monkeypatch.setattr(os, "environ", dict(environ))
    monkeypatch.setattr(distributed, "_own_address", ways.__getitem__)
    monkeypatch.setattr(distributed.psutil, "net_if_addrs", lambda: addresses)
    distributed._settle_gloo_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == wanted


def test_a_first_node_that_knows_itself_as_loopback_only_is_told_what_to_set(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(NODES))
    monkeypatch.setattr(distributed, "_own_address", lambda other: "127.0.1.1" if other == "node0" else "")
    with pytest.raises(ValueError, match=r"node0 is loopback on .* set GLOO_SOCKET_IFNAME"):
        distributed._settle_gloo_interface()


def test_ranks_that_find_other_data_are_named_with_both_numbers(monkeypatch):
    def gathered(mine):
        return [("4 shards, 400 samples, ab", "node0"), mine]

    monkeypatch.setattr(distributed, "gather_objects", gathered)
    distributed.require_alike("data.train", "shards", "4 shards, 400 samples, ab")
    said = r"data\.train: rank 1 on .* has other shards \(3 shards, 300 samples, cd\) than rank 0 on node0 \(4 shards,"
    with pytest.raises(ValueError, match=said):
        distributed.require_alike("data.train", "shards", "3 shards, 300 samples, cd")


@pytest.mark.parametrize(
    ("backend", "ranks", "status", "ends"), [("nccl", 2, 1, True), ("nccl", 2, 0, False), ("gloo", 2, 1, False)]
)
def test_a_failed_rank_does_not_wait_for_the_others_under_nccl(monkeypatch, capsys, backend, ranks, status, ends):
    """Of NCCL only the name is here: this shows which way is taken, not what it does on cards."""
    ways = []

    def end(status: int) -> None:
        ways.append(f"exit {status}")
        raise SystemExit(status)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ways.append("destroy"))
    monkeypatch.setattr(os, "_exit", end)
    try:
        raise KeyError("what went wrong")
    except KeyError:
        if ends:
            with pytest.raises(SystemExit):
                finish(status)
            assert "KeyError: 'what went wrong'" in capsys.readouterr().err
        else:
            finish(status)
    assert ways == ([f"exit {status}"] if ends else ["destroy"])
