"""What a checkpoint is on disk: files, a manifest with their sizes and hashes, and how damage is found.

    checkpoints/step_00000100/   weights/ (index.json, rank_00000.safetensors ...): by parameter name, in pieces,
                                     weight/NAME, exp_avg/NAME, exp_avg_sq/NAME and teacher/NAME, all float32
                                 queue.safetensors  rng_rank00000.safetensors ...  state.json  MANIFEST.json
    checkpoints/latest           name of the newest

Nothing in it depends on the number of ranks or the ZeRO stage but the random states, and no file is a pickle. A
checkpoint is written under a temporary name and renamed when it is whole; `latest` moves after that.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

MANIFEST, STATE, WEIGHTS, QUEUE = "MANIFEST.json", "state.json", "weights", "queue.safetensors"
FORMAT = 2
"""Of this layout; 1 was DeepSpeed's own files."""


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are not those of its manifest."""


def write_manifest(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest of files (name -> bytes, blake2b), with a hash of its own."""
    manifest = {"format": FORMAT, "files": files, "blake2b": _hash_text(files)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Return name -> bytes and blake2b of a checkpoint's files; DamagedCheckpoint when it is not as written."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise DamagedCheckpoint(f"{path} is no whole checkpoint: {MANIFEST} is missing")
    try:
        content = json.loads(manifest.read_text())
    except ValueError:
        raise DamagedCheckpoint(f"{manifest} is damaged: not JSON") from None
    if not isinstance(content, dict) or content.get("blake2b") != _hash_text(content.get("files")):
        raise DamagedCheckpoint(f"{manifest} is damaged: its hash is not its own, or it is of another version")
    if content.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{path} is of format {content.get('format')}, this version reads {FORMAT}")
    return content["files"]


def check_whole(path: Path, part: int = 0, parts: int = 1) -> None:
    """Raise DamagedCheckpoint unless every file is there with the size and hash of the manifest.

    part, parts: look at every parts-th file only, so that ranks can share the work.
    """
    for name, entry in list(read_manifest(path).items())[part::parts]:
        file = path / name
        if not file.is_file():
            raise DamagedCheckpoint(f"{file} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise DamagedCheckpoint(f"{file} has {file.stat().st_size} bytes, the manifest says {entry['bytes']}")
        if hash_file(file) != entry["blake2b"]:
            raise DamagedCheckpoint(f"{file} is damaged: its hash is not the manifest's")


def read_state(path: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint."""
    return json.loads((path / STATE).read_text())


def candidates(folder: Path, resume: str) -> list[Path]:
    """Return what `resume` may mean, best first; none for a fresh start.

    Raises:
        ValueError: `none` in a folder that holds checkpoints.
    """
    present = newest_first(folder)
    if resume == "auto":
        return present
    if resume != "none":
        return [Path(resume)]
    if present:
        raise ValueError(
            f"{folder} already holds {len(present)} checkpoint(s), newest {present[0].name}; "
            "set --resume auto to go on from it, or another --output"
        )
    return []


def newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints from `latest` backwards, then any of later steps, which a run that went back left."""
    present = sorted(folder.glob("step_*"), reverse=True)
    latest = folder / "latest"
    newest = latest.read_text().strip() if latest.is_file() else ""
    left = [path for path in present if newest and path.name > newest]
    return [path for path in present if path not in left] + left


def publish(temporary: Path, final: Path) -> None:
    """Give a whole checkpoint its name, then let `latest` say so."""
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    latest = final.parent / "latest"
    fresh = latest.with_name(".latest.partial")
    fresh.write_text(final.name + "\n")
    os.replace(fresh, latest)


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and leftovers of interrupted ones (main rank only).

    What cannot be deleted now, such as a file that somebody reads over NFS, is said and left to the next time.
    """
    for path in [*newest_first(folder)[keep:], *folder.glob(".step_*.partial")]:
        try:
            shutil.rmtree(path)
        except OSError as error:
            print(f"{path} is left there for now: {error}", file=sys.stderr, flush=True)


def describe_file(path: Path) -> dict[str, Any]:
    """Return what a manifest says of a file."""
    return {"bytes": path.stat().st_size, "blake2b": hash_file(path)}


def hash_file(path: Path) -> str:
    """Return the hash of a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _hash_text(files: Any) -> str:
    return hashlib.blake2b(json.dumps(files, sort_keys=True).encode(), digest_size=16).hexdigest()
