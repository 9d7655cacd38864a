"""Who may import whom, how large a file and a folder may be, and that each says what it is for."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Where the modules of the package lie: kernels and stages stand at the top level and are links in it.
PLACES = {"minimind_fast": "minimind_fast", "kernels": "minimind_fast.kernels", "train": "minimind_fast.stages"}
# Room -> the rooms that it may import. A room is a folder of the package, or a module that lies in none.
BELOW_MODEL = {"ops", "data", "config", "plugins", "errors"}
BELOW_TRAINING = {"infer", "weights", "model"} | BELOW_MODEL
MAY_IMPORT = {
    "errors": set(),
    "console": set(),
    "config": {"errors"},
    "plugins": {"errors"},
    "recipes": set(),
    "kernels": {"config"},
    "data": {"config", "errors"},
    "ops": {"config", "errors"},  # kernels are loaded by name
    "model": {"ops", "config", "errors"},
    "weights": {"model"} | BELOW_MODEL,
    "infer": {"weights", "model"} | BELOW_MODEL,
    "serve": BELOW_TRAINING,
    "training": {"console", "recipes"} | BELOW_TRAINING,
    "rl": {"training"} | BELOW_TRAINING,
    "stages": {"rl", "training"} | BELOW_TRAINING,
    "proof": {"kernels", "stages", "rl", "training", "serve"} | BELOW_TRAINING,
    "commands": {"proof", "stages", "rl", "training", "serve"} | BELOW_TRAINING,
    "cli": {"", "errors", "console"},  # for the version; commands are loaded by name
    "": {"training"} | BELOW_TRAINING,  # the front door: `import minimind_fast as mm`
}
MOST_LINES, MOST_MODULES = 450, 13
WEB = {"fastapi", "starlette", "uvicorn"}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; that of a folder is its `__init__`."""
    found = {}
    for folder, name in PLACES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):  # does not follow the links
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([name, *(part for part in parts if part != "__init__")])] = path
    return found


FILES = [path for path in modules().values() if path.name != "__init__.py"]
FOLDERS = sorted({path.parent for path in modules().values()})
every_module = pytest.mark.parametrize("name", modules())
every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
every_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: str(p.relative_to(ROOT)))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(source: ast.Module, package: str = "", top_level_only: bool = False) -> set[str]:
    """Dotted names that a source imports: `a.b` of `import a.b`, `a.b` of `from a import b`; relative ones made absolute."""
    found = set()
    for node in source.body if top_level_only else ast.walk(source):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            found |= {".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names}
    return found


def ours(name: str) -> set[str]:
    """Modules of the package that a module imports, inside functions too."""
    path = modules()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for target in imported(tree(path), package) - {"minimind_fast"}:  # where the package lies, and no name of it
        if target.split(".")[0] == "minimind_fast":
            while target not in modules():  # a name that a module defines
                target = target.rpartition(".")[0]
            found.add(target)
    return found - {name}


def outside(path: Path, top_level_only: bool = False) -> set[str]:
    """Top-level packages that a file imports."""
    return {name.split(".")[0] for name in imported(tree(path), top_level_only=top_level_only)}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes that are left when those that need no other that is left have been taken away."""
    left = dict(graph)
    while free := [node for node, needs in left.items() if not needs & left.keys()]:
        for node in free:
            del left[node]
    return sorted(left)


# ------------------------------------------------------------------------------------------------------------ the readers


def test_the_readers_see_what_is_there():
    assert "minimind_fast.kernels.swiglu" in modules() and "minimind_fast.stages.sft" in modules()
    assert "minimind_fast.ops" in ours("minimind_fast.model") and "minimind_fast.config" in ours("minimind_fast.model")
    source = ast.parse("import a.b\nfrom . import c\nfrom ..d import e\ndef f():\n    from g import h")
    assert imported(source, "x.y") == {"a.b", "x.y.c", "x.d.e", "g.h"}
    assert imported(source, "x.y", top_level_only=True) == {"a.b", "x.y.c", "x.d.e"}
    assert "triton" in outside(ROOT / "kernels" / "swiglu.py")
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"] and not cycle(
        {"a": {"b"}, "b": set()}
    )


def test_every_room_has_its_place_and_no_two_may_import_each_other():
    assert {room(name) for name in modules()} <= set(MAY_IMPORT)
    assert not cycle(MAY_IMPORT)


# ------------------------------------------------------------------------------------------------------------ the imports


@every_module
def test_imports_go_downwards(name):
    allowed = MAY_IMPORT[room(name)] | {room(name)}
    wrong = {target for target in ours(name) if room(target) not in allowed}
    assert not wrong, f"{name} imports {sorted(wrong)}"


def test_imports_go_in_no_circle():
    graph = {name: ours(name) for name in modules()}
    assert not cycle(graph), "these import each other, or what does"


@every_file
def test_each_dependency_is_imported_where_it_belongs(path):
    place, found = path.relative_to(ROOT), outside(path)
    folder = "/".join(place.parts[:2]) if place.parts[0] == "minimind_fast" else place.parts[0]
    if "triton" in found:
        assert folder in ("kernels", "minimind_fast/proof"), f"{place} imports triton"
    if "deepspeed" in found:
        assert place.parent.as_posix() == "minimind_fast/training/zero", f"{place} imports deepspeed"
    if WEB & found:
        assert folder == "minimind_fast/serve" or place.name == "serve.py", f"{place} imports the web framework"
    if place.parent.name == "remote":  # runs in Transformers, from a model's folder, where nothing of ours is
        assert found <= {"math", "typing", "torch", "transformers"}, f"{place} imports {found}"
        return
    assert not {"transformers", "peft", "trl", "httpx", "openai", "pytest", "benchmarks"} & found, place


def test_the_serve_command_is_there_without_the_web_framework():
    """It says what to install; so only the application may import the framework at once."""
    for path in FILES:
        if WEB & outside(path, top_level_only=True):
            assert path.relative_to(ROOT).parts[1:] == ("serve", "app.py"), path


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.stem)
def test_a_kernel_file_imports_torch_triton_and_what_kernels_share(path):
    assert outside(path) <= {
        "torch",
        "triton",
        "typing",
        "math",
        "collections",
        "__future__",
        "functools",
        "minimind_fast",
    }
    name = f"minimind_fast.kernels.{path.stem}".removesuffix(".__init__")
    ops = {f"minimind_fast.kernels.{record.stem}" for record in (ROOT / "minimind_fast/ops/records").glob("*.py")}
    assert {room(target) for target in ours(name)} <= {"kernels", "config"}
    assert not ours(name) & ops, "the file of an op imports no other op"


def test_the_kernels_package_is_a_docstring_only():
    """Another package is called `kernels` too, and some tools look for it by this name."""
    assert len(tree(ROOT / "kernels" / "__init__.py").body) == 1


def test_triton_in_benchmarks_only_where_kernels_are_compiled():
    found = {path.stem for path in (ROOT / "benchmarks").rglob("*.py") if "triton" in outside(path)}
    assert found <= {"aot", "split_k"}  # the second is an experiment: a kernel that no op has


def test_scripts_are_named_after_no_module_that_they_import():
    """The folder of a script that is run by its path comes first where Python looks."""
    scripts = {path.stem for path in (ROOT / "train").glob("*.py")} - {"__init__"}
    assert not scripts & {name for path in FILES for name in outside(path)}


# -------------------------------------------------------------------------------------------------------- sizes and words


@every_file
def test_a_module_holds_one_idea(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{lines} lines: part it"


@every_folder
def test_a_folder_can_be_taken_in_at_a_glance(folder):
    count = len(list(folder.glob("*.py"))) - 1
    assert count <= MOST_MODULES, f"{count} modules: make rooms"


@every_folder
def test_a_folder_says_what_lives_there(folder):
    text = ast.get_docstring(tree(folder / "__init__.py")) or ""
    assert len(text.split()) >= 12, f"{folder.name}/__init__.py: what lives there, what it may import, who calls it"


@every_file
def test_each_source_file_opens_with_a_docstring_in_three_parts(path):
    text = ast.get_docstring(tree(path)) or ""
    for part in ("Purpose", "Principle", "Properties"):
        assert re.search(rf"^{part}:", text, re.M), f"{path.name} does not say its {part}"


@every_file
def test_no_source_file_names_a_path_of_one_machine(path):
    assert not re.search(r"[\"'](/home/|/work/|/root/|/Users/)", path.read_text(encoding="utf-8"))
