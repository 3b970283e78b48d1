"""Who may import whom (DESIGN.md): read from the syntax tree of every module, so that imports inside functions,
under TYPE_CHECKING and through importlib.import_module("literal") count as well.
"""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PURE = {"simla_ds.config", "simla_ds.types"}
START = {"simla_ds.parsing", "simla_ds.threads"}  # what a programme does first, before torch is imported
MODEL = PURE | {"simla_ds.model", "simla_kernels"}
TASK = MODEL | {"simla_ds.objectives", "simla_ds.teacher"}
LIBRARY = TASK | {"simla_ds.data", "simla_ds.passes", "simla_ds.task", "simla_ds.hub", "simla_ds.downstream"}
TOOLS = {"simla_ds.visualize", "simla_ds.report", "simla_ds.planner", "simla_ds.scoring"}
PROGRAMMES = (
    LIBRARY | TOOLS | START | {f"simla_ds.{name}" for name in ("engine", "evaluation", "verify", "demo", "importing")}
)

# A layer is a module or a package; the longest name that fits a module is its layer.
# Each may import itself, what is listed, and the bare package `simla_ds` (for __version__).
MAY_IMPORT: dict[str, set[str]] = {
    "simla_kernels": set(),
    "simla_ds.config": set(),
    "simla_ds.types": set(),
    "simla_ds.hints": set(),
    "simla_ds.parsing": PURE | {"simla_ds.hints"},
    "simla_ds.threads": set(),
    "simla_ds.model": MODEL,
    "simla_ds.objectives": MODEL,
    "simla_ds.teacher": MODEL,
    "simla_ds.data": PURE,
    "simla_ds.passes": MODEL,
    "simla_ds.task": TASK | {"simla_ds.passes"},
    "simla_ds.hub": PURE | {"simla_ds.model", "simla_ds.data"},
    "simla_ds.downstream": TASK | {f"simla_ds.{name}" for name in ("data", "hub", "task", "engine.distributed")},
    "simla_ds.verify": LIBRARY | {"simla_ds.verify_tasks"},
    "simla_ds.verify_tasks": LIBRARY | {"simla_ds.verify"},
    "simla_ds.evaluation": LIBRARY | {"simla_ds.verify"},
    "simla_ds.scoring": PURE | {f"simla_ds.{name}" for name in ("data", "hub", "model")},
    "simla_ds.importing": LIBRARY,
    "simla_ds.engine": LIBRARY | {f"simla_ds.{name}" for name in ("evaluation", "parsing")},
    "simla_ds.visualize": LIBRARY | {"simla_ds.engine", "simla_ds.evaluation"},
    "simla_ds.report": LIBRARY | {"simla_ds.engine", "simla_ds.evaluation"},
    "simla_ds.planner": LIBRARY | {"simla_ds.engine", "simla_ds.evaluation"},
    "simla_ds.demo": PROGRAMMES,
    "simla_ds.cli": PROGRAMMES,
    "launch": PROGRAMMES,
}
# Not checked, since they may import anything, and imported by nobody above: benchmarks, tests.
OURS = ("simla_ds", "simla_kernels", "launch", "benchmarks", "tests")


@dataclass(frozen=True)
class Import:
    importer: str
    line: int
    target: str
    lazy: bool
    """True inside a function: it runs when called, not when the module is imported."""

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def layer_of(module: str) -> str | None:
    fitting = [layer for layer in MAY_IMPORT if is_within(module, layer)]
    return max(fitting, key=len, default=None)


def modules_of(root: Path) -> dict[str, Path]:
    """Return dotted name -> file for every module that the rules govern."""
    found = {}
    for folder, base in (("simla_ds", root), ("kernels/simla_kernels", root / "kernels"), ("launch", root)):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def named_targets(node: ast.AST, package: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (module, names taken from it) for each module that this node imports; package resolves leading dots."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, []) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        module = ".".join([*parents, *([node.module] if node.module else [])])
        yield module, [alias.name for alias in node.names]
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            yield node.args[0].value, []


def imports_of(root: Path) -> list[Import]:
    """Return every import of every governed module. `from package import module` counts as package.module."""
    modules = modules_of(root)
    found = []

    def visit(node: ast.AST, importer: str, package: str, lazy: bool) -> None:
        for module, names in named_targets(node, package):
            targets = {f"{module}.{name}" if f"{module}.{name}" in modules else module for name in names} or {module}
            line = getattr(node, "lineno", 0)
            found.extend(Import(importer, line, target, lazy) for target in sorted(targets))
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, importer, package, lazy)

    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        visit(ast.parse(path.read_text(encoding="utf-8"), str(path)), name, package, lazy=False)
    return found


def layer_violation(item: Import) -> str | None:
    """Return what is wrong with an import of one of our modules, or None."""
    if item.importer == "simla_ds":
        return f"{item}: simla_ds/__init__.py imports nothing of ours"
    layer = layer_of(item.importer)
    if layer is None:
        return None  # violations() says so once per module
    allowed = MAY_IMPORT[layer] | {layer}
    if item.target == "simla_ds" or any(is_within(item.target, name) for name in allowed):
        return None
    return f"{item}: {layer} may import {', '.join(sorted(allowed))}"


def library_violation(item: Import) -> str | None:
    """Return what is wrong with an import of deepspeed, triton or, in the kernels, of anything but torch."""
    library = item.target.partition(".")[0]
    if library == "deepspeed" and not is_within(item.importer, "simla_ds.engine"):
        return f"{item}: only simla_ds.engine may"
    if library == "triton" and not item.importer.endswith("_triton"):
        return f"{item}: only *_triton.py may"
    known = {"torch", "triton", *OURS, *sys.stdlib_module_names}
    if item.importer == "simla_kernels.layer_norm" and item.lazy:
        known |= {"apex", "fused_layer_norm_cuda"}  # NVIDIA Apex, where it is there
    if is_within(item.importer, "simla_kernels") and library not in known:
        return f"{item}: kernels use torch, and triton inside *_triton.py"
    return None


def kernel_violation(item: Import) -> str | None:
    """Return what is wrong with an import of simla_kernels: its insides are its own, triton comes at dispatch."""
    private = any(part.startswith("_") or part.endswith("_triton") for part in item.target.split("."))
    if private and not is_within(item.importer, "simla_kernels"):
        return f"{item}: only public names of simla_kernels"
    if item.target.endswith("_triton") and not item.lazy and not item.importer.endswith("_triton"):
        return f"{item}: at import; import it inside the function that dispatches to it"
    return None


def violations(root: Path) -> list[str]:
    """Return one line per broken rule in the checkout (or copy) at root."""
    strays = [name for name in modules_of(root) if name != "simla_ds" and layer_of(name) is None]
    found = [f"{name} has no layer: give it a row in MAY_IMPORT and in DESIGN.md" for name in strays]
    for item in imports_of(root):
        ours = item.target.partition(".")[0] in OURS
        checks = [library_violation] + ([layer_violation] if ours else [])
        checks += [kernel_violation] if is_within(item.target, "simla_kernels") else []
        found += [message for check in checks if (message := check(item)) is not None]
    return found


def test_every_import_follows_the_table(project_root):
    assert violations(project_root) == []


@pytest.fixture(scope="module")
def copy_of_sources(project_root, tmp_path_factory):
    """Return a copy of the governed sources, free of violations of its own as long as the test above passes."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("simla_ds", "kernels", "launch"):
        shutil.copytree(
            project_root / folder,
            root / folder,
            ignore=lambda where, names: [n for n in names if Path(where, n).is_file() and not n.endswith(".py")],
        )
    return root


@pytest.mark.parametrize(
    ("file", "code", "caught"),
    [
        ("simla_ds/config.py", "from simla_ds.types import Batch", "simla_ds.config:1 imports simla_ds.types"),
        ("simla_ds/model/planted.py", "from simla_ds.objectives import itc", "imports simla_ds.objectives"),
        ("simla_ds/model/planted.py", "def f():\n    import simla_ds.data.shards", "planted:2 imports simla_ds.data"),
        (
            "simla_ds/data/planted.py",
            "if TYPE_CHECKING:\n    from ..model import simla",
            "planted:2 imports simla_ds.m",
        ),
        ("simla_ds/data/planted.py", "importlib.import_module('simla_ds.task')", "imports simla_ds.task"),
        ("simla_ds/downstream/planted.py", "from simla_ds.engine import trainer", "imports simla_ds.engine"),
        ("simla_ds/hub.py", "import simla_ds.engine.distributed", "imports simla_ds.engine.distributed"),
        ("simla_ds/evaluation.py", "from simla_ds.cli import main", "imports simla_ds.cli"),
        ("simla_ds/__init__.py", "from .config import Config", "simla_ds:1 imports simla_ds.config"),
        ("simla_ds/cli.py", "from tests import conftest", "imports tests"),
        ("simla_ds/unheard_of.py", "", "simla_ds.unheard_of has no layer"),
        ("simla_ds/cli.py", "def f():\n    import deepspeed.comm", "imports deepspeed.comm: only simla_ds.engine"),
        ("launch/pretrain.py", "from deepspeed import initialize", "imports deepspeed: only simla_ds.engine"),
        ("simla_ds/model/planted.py", "import triton.language as tl", "imports triton.language: only *_triton.py"),
        ("kernels/simla_kernels/planted.py", "import numpy", "imports numpy: kernels use torch"),
        ("kernels/simla_kernels/planted.py", "import apex", "imports apex: kernels use torch"),
        ("kernels/simla_kernels/planted.py", "from simla_ds.types import Batch", "imports simla_ds.types"),
        ("kernels/simla_kernels/planted.py", "from simla_kernels.x_triton import f", "at import; import it inside"),
        ("simla_ds/model/planted.py", "import simla_kernels.x_triton", "only public names of simla_kernels"),
    ],
)
def test_a_planted_violation_is_caught(copy_of_sources, file, code, caught):
    path = copy_of_sources / file
    before = path.read_text(encoding="utf-8") if path.exists() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.write_text(code, encoding="utf-8")
        assert any(caught in line for line in violations(copy_of_sources)), violations(copy_of_sources)
    finally:
        if before is None:
            path.unlink()
        else:
            path.write_text(before, encoding="utf-8")


def test_what_the_table_allows_is_not_caught(copy_of_sources):
    planted = {
        "simla_ds/engine/planted.py": "import deepspeed\nfrom .distributed import rank\nfrom ..task import Task\n",
        "simla_ds/downstream/planted.py": "from simla_ds.engine.distributed import rank\nimport simla_ds\n",
        "kernels/simla_kernels/planted.py": "import math, torch\ndef f():\n    from .planted_triton import g\n",
        "kernels/simla_kernels/planted_triton.py": "import triton\nfrom triton import language as tl\n",
    }
    for file, code in planted.items():
        (copy_of_sources / file).parent.mkdir(exist_ok=True)
        (copy_of_sources / file).write_text(code, encoding="utf-8")
    found = [line for line in violations(copy_of_sources) if "planted" in line]
    for file in planted:
        (copy_of_sources / file).unlink()
    assert found == []


BLOCKER = """
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("deepspeed", "triton"):
                raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)
            return None

    sys.meta_path.insert(0, Blocker())
"""


def run_without_deepspeed_and_triton(code: str, *arguments: str) -> None:
    script = textwrap.dedent(BLOCKER) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_the_blocker_blocks():
    run_without_deepspeed_and_triton(
        """
        for name in ("deepspeed", "triton", "triton.language"):
            try:
                __import__(name)
            except ModuleNotFoundError:
                continue
            raise SystemExit(f"{name} came through")
        """
    )


def test_everything_below_the_engine_imports_without_deepspeed_and_triton(project_root):
    """Whatever the table keeps from the engine, and the command line, whose `verify` works without deepspeed."""
    below = [layer for layer, allowed in MAY_IMPORT.items() if "simla_ds.engine" not in allowed | {layer}]
    modules = [name for name in modules_of(project_root) if not name.endswith("_triton")]
    names = ["simla_ds.cli", *(name for name in modules if layer_of(name) in below)]
    run_without_deepspeed_and_triton(
        "import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)", *names
    )


def test_a_model_folder_loads_and_runs_without_deepspeed_and_triton(tmp_path):
    """Save a small model with both at hand, then load it and run one forward where neither can be imported."""
    from simla_ds.config import ModelConfig, VocabularyConfig
    from simla_ds.hub import SimlaConfig, SimlaModel

    config = ModelConfig(vocabulary=VocabularyConfig(size=50, visual_size=32))
    SimlaModel(SimlaConfig.from_model_config(config)).save_pretrained(tmp_path)
    run_without_deepspeed_and_triton(
        """
        import torch
        from simla_ds.hub import SimlaModel

        model = SimlaModel.from_pretrained(sys.argv[1]).eval().model
        size = model.config.vision.image_size
        ids, mask = torch.tensor([[2, 7, 9]]), torch.ones(1, 3, dtype=torch.bool)
        with torch.no_grad():
            features = model.features(torch.zeros(1, 3, size, size), ids, mask)
            fused, _ = model.text_over_image(ids, mask, features.image_tokens)
        assert fused.shape == (1, 3, model.config.stream.width) and fused.isfinite().all()
        """,
        str(tmp_path),
    )


def test_every_folder_with_modules_is_a_package(project_root):
    """find_packages skips a folder without __init__.py, so an installed wheel would lack it; `kernels` is none."""
    folders = {
        path.parent for path in [*(project_root / "simla_ds").rglob("*.py"), *project_root.glob("kernels/*/*.py")]
    }
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []
    assert not (project_root / "kernels/__init__.py").exists(), "it would shadow Hugging Face's `kernels`"


def test_no_requirement_is_the_wrong_apex():
    """PyPI's apex is a Pyramid toolkit; NVIDIA's is found at run time, never required."""
    required = importlib.metadata.requires("simla_ds") or []
    assert required
    assert [name for name in required if re.match(r"apex\b", name)] == []
