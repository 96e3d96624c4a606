"""The picture of the package: a module imports only from lower floors, and the core needs torch and numpy alone."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "modalities"
FLOORS = {
    0: {
        "attention", "compiling", "config", "fields", "histogram", "log", "muon", "mup", "packing", "pairs",
        "profiling", "ranks", "rng", "rope", "sources",
    },
    1: {"cli", "devices", "dist", "loss", "mixture", "model", "optim", "pbin"},
    2: {
        "account", "corpus", "demo", "demo_chat", "durable", "ema", "families", "files", "fingerprints", "fsdp",
        "heartbeat", "kl", "noise", "parts", "presets", "run", "sequences", "stopping", "tokenizer", "workplace",
    },
    3: {"chat", "data", "encode", "masks", "shards", "shuffle", "step"},
    4: {"checkpoint", "describe", "guard", "memory", "pack", "topk"},
    5: {"commands", "saving", "trained"},
    6: {"adopt", "evaluate", "generate", "teacher"},
    7: {"average", "recipe"},
    8: {"coordinates", "folder", "hf", "members", "search", "sweep_results", "variants"},
    9: {"loop", "optuna_search"},
    10: {"noise_advice"},
    11: {"sweep"},
}  # fmt: skip
FLOOR_OF = {module: floor for floor, modules in FLOORS.items() for module in modules}
CORE = ("attention", "model", "data", "loss", "optim", "fsdp", "step", "loop", "checkpoint")
NOT_NEEDED = (
    "tyro", "datasets", "tokenizers", "tensorboard", "matplotlib", "orjson", "wandb", "transformers", "pyarrow",
    "simdjson", "fastokens", "jinja2",
)  # fmt: skip
MODULES = sorted(path for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imported_modules(path: Path) -> set[str]:
    """The modules of the package that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "modalities":
            found |= {alias.name for alias in node.names if not alias.name.startswith("__")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("modalities."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("modalities.")}
    return found


def test_every_module_has_a_floor() -> None:
    assert {path.stem for path in MODULES} == set(FLOOR_OF)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_go_down(path: Path) -> None:
    for module in imported_modules(path):
        assert FLOOR_OF[module] < FLOOR_OF[path.stem], f"{path.name} imports {module}"


def test_readme_tells_the_same_floors() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)\.py` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {module: int(floor) for floor, module in rows} == FLOOR_OF


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_module_is_longer_than_a_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450


def test_commands_only_parse() -> None:
    for name in ("train.py", "prep.py"):
        assert len((ROOT / name).read_text().splitlines()) < 80


def test_the_loop_can_be_seen_whole() -> None:
    functions = {n.name: n for n in ast.parse((PACKAGE / "loop.py").read_text()).body if isinstance(n, ast.FunctionDef)}
    loop = functions["train"]
    assert loop.end_lineno is not None and loop.end_lineno - loop.lineno < 60


def test_core_needs_torch_and_numpy_alone() -> None:
    code = f"import sys; {'; '.join(f'import modalities.{m}' for m in CORE)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(NOT_NEEDED) & set(loaded)


def test_list_of_recipes_does_not_wait_for_torch() -> None:
    code = f"import sys; sys.argv = ['train.py', '--help']; sys.path.insert(0, {str(ROOT)!r}); import train; " + (
        "train.main(['--help']); assert 'torch' not in sys.modules, 'torch'; assert 'tyro' not in sys.modules, 'tyro'"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "gpt2_60m" in shown
