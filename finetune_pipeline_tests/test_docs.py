"""The commands, targets, files and headings that the docs name exist."""

import ast
import re
import subprocess

import click
import pytest
import yaml

from finetune_pipeline.cli.main import finetune
from finetune_pipeline.settings import PROJECT_ROOT, LoopSettings, load_loops

DOCUMENTS = [
    PROJECT_ROOT / "README.md",
    PROJECT_ROOT / "CONTRIBUTING.md",
    *sorted((PROJECT_ROOT / "docs").rglob("*.md")),
]
VAULT = "finetune_pipeline_tests/sources/vault/"  # notes with links that are broken on purpose


def tracked_files(*patterns):
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *patterns]
    names = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    paths = [PROJECT_ROOT / name for name in names if name and not name.startswith(VAULT)]
    return [path for path in paths if path.is_file()]


README = DOCUMENTS[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_the_docs_exist(document):
    for words in re.findall(r"(?:\.venv/bin/|`)finetune ([a-z][a-z |]*)", document.read_text(encoding="utf-8")):
        words = words.strip().partition("  ")[0]  # a column of descriptions may follow
        first, *rest = re.split(r"[ |]+", words)
        command = finetune.commands.get(first)
        assert command is not None, f"finetune {first}"
        if isinstance(command, click.Group):
            subcommands = rest if "|" in words else rest[:1]
            assert {word for word in subcommands if word} <= {*command.commands, "v"}, words  # v: of a version


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z-]+)`?", README))))
def test_make_targets_in_the_readme_exist(target):
    makefile = (PROJECT_ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def anchors(text):
    """Return the anchors that GitHub gives the headings of a page."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S), re.MULTILINE):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = 0
        while f"{slug}-{number}" in found or (number == 0 and slug in found):
            number += 1
        found.add(f"{slug}-{number}" if number else slug)
    return found


@pytest.mark.parametrize("document", tracked_files("*.md"), ids=lambda path: str(path.relative_to(PROJECT_ROOT)))
def test_links_lead_to_files_and_headings(document):
    text = document.read_text(encoding="utf-8")
    broken = []
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            broken.append(target)
    assert broken == []


def test_every_page_is_in_the_index():
    index = PROJECT_ROOT / "docs" / "README.md"
    linked = {(index.parent / name).resolve() for name in re.findall(r"\]\(([^)#]+\.md)\)", index.read_text("utf-8"))}
    assert {path for path in (PROJECT_ROOT / "docs").rglob("*.md") if path != index} <= linked


def test_pages_named_in_code_and_text_exist():
    named = {}
    for path in tracked_files("*.md", "*.py", "*.sh", "*.yaml", "*.yml", "*.toml", "*.json", "Makefile"):
        for name in re.findall(r"\bdocs/[\w/-]+\.md", path.read_text(encoding="utf-8")):
            named.setdefault(name, path.name)
    assert {name: where for name, where in named.items() if not (PROJECT_ROOT / name).exists()} == {}


SCHEMA = LoopSettings.model_json_schema()


def settings_below(node):
    """Return the settings of a section of the JSON Schema: name -> schema."""
    node = SCHEMA["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
    found = dict(node.get("properties", {}))
    for one in [*node.get("anyOf", []), *node.get("oneOf", []), *([node["items"]] if "items" in node else [])]:
        found |= settings_below(one)
    return found


SECTIONS = [name for name, node in settings_below(SCHEMA).items() if settings_below(node)]
SETTING = rf"(?<![\w./$-])((?:{'|'.join(SECTIONS)})(?:\.[a-z_]+)+)\b(?!\()"
DECISIONS = PROJECT_ROOT / "docs" / "explanation" / "decisions.md"  # keeps the names of its time


def is_setting(name):
    node = SCHEMA
    for part in name.split("."):
        below = settings_below(node)
        if part not in below:
            return not below  # a key of a mapping, such as of trainer_config
        node = below[part]
    return True


def is_code_or_file(name):
    first, second, *_ = name.split(".")
    module = PROJECT_ROOT / "finetune_pipeline" / first / f"{second}.py"
    return module.is_file() or name.endswith((".py", ".log", ".lock"))


@pytest.mark.parametrize("suffix", ["md", "py"])
def test_settings_named_in_docs_and_messages_exist(suffix):
    named = {}
    for path in DOCUMENTS if suffix == "md" else (PROJECT_ROOT / "finetune_pipeline").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if suffix == "md":
            texts = re.findall(r"`([^`\n]+)`", text)
        else:
            texts = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
        for one in texts if path != DECISIONS else ():
            for name in re.findall(SETTING, one) if isinstance(one, str) else ():
                if not is_code_or_file(name):
                    named.setdefault(name, path.name)
    assert len(named) > 30
    assert {name: where for name, where in named.items() if not is_setting(name)} == {}


def test_decisions_are_numbered_and_have_a_date_and_a_status():
    text = DECISIONS.read_text(encoding="utf-8")
    form = r"^## (\d+)\. \S.*\n\n\d{4}-\d\d-\d\d, (?:accepted|superseded by \d+)\.$"
    numbers = [int(number) for number in re.findall(form, text, re.MULTILINE)]
    assert len(numbers) == text.count("\n## ")
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_readmes_steps_to_a_second_loop_work(monkeypatch):
    monkeypatch.setenv("FINETUNE_LOOPS_DIR", str(PROJECT_ROOT / "examples"))
    loops = load_loops()
    assert list(loops) == ["aec_parser", "meeting_notes"]
    second = loops["meeting_notes"]
    for path in (second.base_model, second.log_folders[0], second.evaluation.benchmark):
        assert (PROJECT_ROOT / path).exists()


def test_the_workspace_names_the_code_location():
    for path in [*(PROJECT_ROOT / ".github" / "workflows").glob("*.yml"), PROJECT_ROOT / "workspace.yaml"]:
        assert yaml.safe_load(path.read_text(encoding="utf-8"))
    workspace = yaml.safe_load((PROJECT_ROOT / "workspace.yaml").read_text())["load_from"][0]["python_module"]
    pyproject = (PROJECT_ROOT / "pyproject.toml").read_text()
    assert workspace["module_name"] == "finetune_pipeline.definitions"
    assert pyproject.count(f'code_location_name = "{workspace["location_name"]}"') == 2
