"""All cells of a grid that have no row yet, each in a process of its own; a later call goes on where one stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

from benchmarks.data_efficiency.cell import Planned
from benchmarks.data_efficiency.devices import slots
from benchmarks.data_efficiency.identity import ROOT, code_hash
from benchmarks.data_efficiency.rows import DONE, FAILED, Row, read_row, row_path, write_row


def state(planned: Planned, results: Path) -> str:
    """Return "done", "failed" or "open"; the row must be of this code and configuration."""
    row = read_row(file_of(planned, results))
    return "open" if row is None else row["status"]


def file_of(planned: Planned, results: Path) -> Path:
    """Return where a cell's row lies under the code and configuration of now."""
    return row_path(results, planned.cell, planned.config_hash, code_hash())


def table(cells: Sequence[Planned], results: Path) -> str:
    """Return a line per cell: its state and, when done, what it took."""
    lines = []
    for planned in cells:
        row, known = read_row(file_of(planned, results)), state(planned, results)
        more = ""
        if row is not None:
            more = row["error"] if known == FAILED else f"{row['seconds']:.0f} s, {row['pairs_seen']} pairs"
        lines.append(f"{planned.cell.name:32} {known:7} {more}".rstrip())
    return "\n".join(lines)


class Runner:
    """Runs cells through `python -m benchmarks data_efficiency --cell`, so that any one is repeated the same way."""

    def __init__(self, arguments: Sequence[str], results: Path):
        """arguments: the command line that names the grid, for the cells' processes."""
        self.arguments, self.results = arguments, results
        self._lock, self._running, self._ending = Lock(), set(), False
        self._slots: SimpleQueue[list[str]] = SimpleQueue()

    def run(self, cells: Sequence[Planned], jobs: int) -> None:
        """Run cells, `jobs` side by side, on cards of their own, and print how each ended.

        Interrupted, it ends what runs, without a row. Raises ValueError when there are too few cards.
        """
        for slot in slots(jobs, max((planned.grid.launch.ranks for planned in cells), default=1)):
            self._slots.put(slot)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # or cells would outlive this process
        with ThreadPoolExecutor(jobs) as pool:
            waiting = {pool.submit(self._run, planned): planned for planned in cells}
            try:
                for number, done in enumerate(as_completed(waiting), start=1):
                    print(f"{number} of {len(cells)} {waiting[done].cell.name}: {done.result()}", flush=True)
            except BaseException:  # Ctrl-C, a signal, or a defect here: nothing may go on running unseen
                pool.shutdown(wait=False, cancel_futures=True)
                self._end_all()
                raise

    def _run(self, planned: Planned) -> str:
        """Run one cell on cards that no other has; return its state. A cell that fails gets a row that says so."""
        slot = self._slots.get()
        try:
            return self._run_on(slot, planned)
        finally:
            self._slots.put(slot)

    def _run_on(self, cards: Sequence[str], planned: Planned) -> str:
        log = planned.folder.with_name(f"{planned.folder.name}.log")  # a variant has a dot in its name
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks", "data_efficiency", *self.arguments, "--cell", planned.cell.name]
        started = time.monotonic()
        environ = {**os.environ, "OMP_NUM_THREADS": str(planned.grid.launch.threads)}
        if cards:
            environ["CUDA_VISIBLE_DEVICES"] = ",".join(cards)
        with log.open("w") as out:
            process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=out, stderr=out, start_new_session=True)
            with self._lock:
                self._running.add(process.pid)
            status = process.wait()
            with self._lock:
                self._running.discard(process.pid)
        if status == 0:
            return f"{DONE} in {time.monotonic() - started:.0f} s"
        lines = log.read_text(encoding="utf-8").splitlines()
        error = f"exit status {status}: {lines[-1] if lines else 'it said nothing'}"
        if not self._ending:  # else it was ended by us, which says nothing about the cell
            write_row(file_of(planned, self.results), _failed_row(planned, error))
        return f"{FAILED}, {error}"

    def _end_all(self) -> None:
        self._ending = True
        with self._lock:
            for process in self._running:
                os.killpg(process, signal.SIGTERM)


def _failed_row(planned: Planned, error: str) -> Row:
    cell = planned.cell
    return {
        "grid": planned.grid.name,
        "cell": cell.name,
        "status": FAILED,
        "error": error,
        "group": cell.group,
        "objectives": cell.objectives,
        "variant": cell.variant,
        "fraction": cell.fraction,
        "seed": cell.seed,
        "code_hash": code_hash(),
        "grid_hash": planned.grid.shared_hash,
        "data_hash": planned.pairs.digest,
        "config_hash": planned.config_hash,
        "execution": planned.execution,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
