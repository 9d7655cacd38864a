"""Who may import whom, and that each source file says what it is for."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = sorted((ROOT / "minimind_fast").glob("*.py"))
SERVER = sorted((ROOT / "minimind_fast" / "server").glob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
TRAIN = sorted((ROOT / "train").glob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))

# These modules stand on those of their own line and of the lines before, bottom first.
LAYERS = [
    {"config", "losses", "reference", "attention_rows", "cpu_shapes", "schema"},
    {"attention", "cpu_ops"},
    {"ops"},
    {"model", "tokenizer"},
    {"lora", "checkpoint", "token_cache", "data", "sampling"},
    {"decode"},
    {"generate", "slots"},
    {"resume", "progress", "engine", "stage", "trainer", "verify"},
]
# Modules that stand on everything: nothing of the package imports them, save the package's front door.
TOP = {"chat", "serve", "cli", "verify"}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names that a file imports, relative ones made absolute."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ("minimind_fast." if node.level else "") + (node.module or "")
            found |= {f"{base.rstrip('.')}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """Modules of the package that a file imports: 'model', 'kernels.rope', ..."""
    found = set()
    for name in imports(path):
        if not name.startswith("minimind_fast"):
            continue
        parts = name.split(".")[1:]
        if parts and parts[0] == "kernels":
            found.add(".".join(parts[:2]))
        elif parts and (ROOT / "minimind_fast" / f"{parts[0]}.py").exists():
            found.add(parts[0])
    return found


def outside(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def test_the_import_reader_sees_what_is_there():
    assert {"reference", "attention"} <= ours(ROOT / "minimind_fast" / "ops.py")
    assert "torch" in outside(ROOT / "minimind_fast" / "reference.py")
    assert "triton" in outside(ROOT / "kernels" / "swiglu.py")


def test_config_imports_nothing_of_ours():
    assert ours(ROOT / "minimind_fast" / "config.py") == set()


@pytest.mark.parametrize("name", ["reference", "attention_rows", "cpu_ops", "cpu_shapes", "losses", "precision"])
def test_the_bottom_stands_on_torch_alone(name):
    path = ROOT / "minimind_fast" / f"{name}.py"
    assert ours(path) <= {"reference", "cpu_shapes"}
    assert "triton" not in outside(path)


def test_ops_stands_on_the_bottom_and_attention_and_loads_kernels_by_name_only():
    assert ours(ROOT / "minimind_fast" / "ops.py") == {"reference", "cpu_ops", "attention", "precision"}


def test_the_model_calls_ops_and_no_implementation():
    # attention's helpers stand beside the reference; generate is imported inside a method, for model.generate(...)
    assert ours(ROOT / "minimind_fast" / "model.py") <= {
        *("ops", "config", "attention", "attention_rows", "cpu_shapes", "generate")
    }
    assert "minimind_fast.infer.generate.generate" not in imports(
        ROOT / "minimind_fast" / "model.py", top_level_only=True
    )


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: p.stem)
def test_modules_import_downwards(path):
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    if path.stem not in rank:
        return  # held by the test below, that nothing goes in a circle
    above = {name for name in ours(path) if rank.get(name, -1) > rank[path.stem]}
    if path.stem == "model":
        above -= {"generate"}  # inside a method: model.generate(...) is that module's
    assert not above, f"{path.name} imports {sorted(above)}, which stand on it"


def test_imports_go_in_no_circle():
    left = {path.stem: ours(path) for path in PACKAGE}
    left["model"] -= {"generate"}
    while free := [name for name, needs in left.items() if not needs & (set(left) - {name})]:
        for name in free:
            del left[name]
    assert not left, f"these import each other: {sorted(left)}"


@pytest.mark.parametrize("path", PACKAGE + KERNELS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_nobody_imports_what_stands_on_everything_or_train(path):
    if path.stem not in TOP | {"__init__"}:
        assert not ours(path) & TOP
    assert not any(re.match(r"train(\.|$)", name) for name in imports(path))


@pytest.mark.parametrize("path", PACKAGE + TRAIN, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_triton_only_in_kernels_and_deepspeed_only_in_the_trainer(path):
    assert "triton" not in outside(path)
    if "deepspeed" in outside(path):
        assert path.stem in ("trainer", "engine", "resume") and path.parent.name == "minimind_fast"


@pytest.mark.parametrize("path", PACKAGE + SERVER + KERNELS + TRAIN, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_the_web_framework_only_in_the_server_and_there_in_no_part_that_needs_it_not(path):
    web = {"fastapi", "starlette", "uvicorn", "httpx", "openai"} & outside(path)
    app = path.stem == "app" and path.parent.name == "server"
    assert not web or app or path.stem == "serve"
    # The command's own module is imported where the extra is not installed, to say so.
    at_once = {name.split(".")[0] for name in imports(path, top_level_only=True)}
    assert app or not at_once & {"fastapi", "starlette", "uvicorn"}
    if path not in SERVER and path.stem != "serve":
        assert not any(
            name.startswith(("minimind_fast.commands.serve", "minimind_fast.serve")) for name in imports(path)
        )


@pytest.mark.parametrize("path", PACKAGE + KERNELS + TRAIN, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_transformers_nowhere(path):
    assert "transformers" not in outside(path)


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda p: p.stem)
def test_triton_in_benchmarks_only_where_kernels_are_compiled(path):
    if "triton" in outside(path):
        assert path.stem in ("aot", "split_k")  # the second is an experiment: a kernel that no op has


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.stem)
def test_a_kernel_file_imports_torch_and_triton_only(path):
    assert outside(path) <= {"torch", "triton", "typing", "math", "collections", "__future__", "functools"}


def test_the_kernels_package_is_a_docstring_only():
    assert len(ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body) == 1


def test_scripts_are_named_after_no_module_that_they_import():
    for path in TRAIN:
        assert path.stem not in {n.split(".")[0] for p in PACKAGE + TRAIN for n in imports(p)}, path.name


SOURCES = [p for p in PACKAGE + SERVER + KERNELS + TRAIN if p.name != "__init__.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_each_source_file_opens_with_a_docstring_in_three_parts(path):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    for part in ("Purpose", "Principle", "Properties"):
        assert re.search(rf"^{part}:", text, re.M), f"{path.name} does not say its {part}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_no_source_file_names_a_path_of_one_machine(path):
    assert not re.search(r"[\"'](/home/|/work/|/root/|/Users/)", path.read_text(encoding="utf-8"))
