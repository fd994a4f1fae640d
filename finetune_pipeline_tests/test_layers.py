"""The layers of docs/explanation/architecture.md: which package may import which."""

import ast
import json
import subprocess
import sys

import pytest

from finetune_pipeline.settings import PROJECT_ROOT

PACKAGE = PROJECT_ROOT / "finetune_pipeline"
ENTRY_POINTS = {"orchestration", "serving", "cli", "console"}
DOMAIN = {"feedback", "sources", "curation", "training", "export", "evaluation", "registry", "deployment"}
INFRASTRUCTURE = {
    "alerts",
    "alpaca",
    "artifacts",
    "database",
    "hosts",
    "inference",
    "manifests",
    "markdown_table",
    "orchestrator",
    "ray_session",
    "records",
    "refusals",
    "schemas",
    "settings",
    "subprocess_lifetime",
    "tool_calls",
    "trainer_fields",
    "validation_messages",
    "wording",
    "words",
    "yaml_files",
}
HEAVY = {"torch", "transformers", "datasets", "llama_cpp", "trl", "peft", "matplotlib", "pandas", "pyarrow", "ray"}
HEAVY |= {"streamlit"}
IN_THE_CONSOLE = {"pandas", "streamlit"}  # its pages are loaded by Streamlit alone
# Only the engine's child process imports its native layer, and only the training process imports the callbacks, which
# are subclasses of transformers' TrainerCallback.
ONLY_IN_THE_CHILD = {"inference/native.py", "training/callbacks.py"}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "migrations" not in path.parts)


def imports(path, *, module_level=False):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if module_level else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_the_layers(path):
    here = part(path)
    allowed = {
        **{package: {package} | INFRASTRUCTURE for package in DOMAIN},
        **dict.fromkeys(INFRASTRUCTURE, INFRASTRUCTURE),
        "pipeline": {"pipeline"} | DOMAIN | INFRASTRUCTURE,
        **{entry: {"pipeline", entry} | DOMAIN | INFRASTRUCTURE for entry in ENTRY_POINTS},
        "cli": ENTRY_POINTS | {"pipeline"} | DOMAIN | INFRASTRUCTURE,
    }.get(here)
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "dagster":
            assert here in {"orchestration", "defs", "definitions"}, f"{path} imports {name}"
        if top == "finetune_pipeline" and rest and allowed is not None:
            assert rest[0] in allowed, f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_packages_are_imported_inside_functions(path):
    if str(path.relative_to(PACKAGE)) not in ONLY_IN_THE_CHILD:
        heavy = HEAVY - IN_THE_CONSOLE if part(path) == "console" else HEAVY
        assert not heavy & {name.split(".")[0] for name in imports(path, module_level=True)}


@pytest.mark.parametrize("module", ["finetune_pipeline.definitions", "finetune_pipeline.cli.main"])
def test_definitions_and_commands_load_no_heavy_package(module):
    script = f"""
import importlib, json, sys
module = importlib.import_module({module!r})
if hasattr(module, "defs"):
    module.defs().resolve_asset_graph()
print(json.dumps(sorted({HEAVY!r} & set(sys.modules))))
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    # Dagster imports none of these.
    assert json.loads(output.splitlines()[-1]) == []


def test_no_module_is_named_utils():
    assert not [path for path in PACKAGE.rglob("*") if path.stem in {"utils", "helpers", "common", "misc"}]


def test_no_import_cycles():
    modules = {
        ".".join(path.relative_to(PROJECT_ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES
    }
    graph = {
        name: {
            target
            for imported in imports(path)
            for target in [imported if imported in modules else imported.rpartition(".")[0]]
            if target in modules and target != name
        }
        for name, path in modules.items()
    }
    in_cycle = []
    for name, ahead in graph.items():
        found, left = set(), list(ahead)
        while left:
            one = left.pop()
            if one not in found:
                found.add(one)
                left += graph[one]
        if name in found:
            in_cycle.append(name)
    assert in_cycle == []


def test_class_names_are_used_once():
    names: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                names.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: paths for name, paths in names.items() if len(paths) > 1} == {}
