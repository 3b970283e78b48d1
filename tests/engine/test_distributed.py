"""Starting and ending ranks under the real launcher."""

import json
from pathlib import Path

import pytest

from tests.engine.launching import launch


@pytest.mark.launcher
def test_killed_ranks_leave_nothing_in_shared_memory():
    done = launch("tests.engine.workers.shared_memory", ranks=2)
    said = next((json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")), None)
    assert said, done.stderr[-3000:]
    buffer = f"_{said['port']}_"
    assert all(sum(buffer in name for name in names) == 2 for names in said["mapped"]), "nothing is shared any more?"
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*{buffer}*"))
