"""The commands, targets and files that the docs name exist."""

import re

import click
import pytest
import yaml

from finetune_pipeline.cli.main import finetune
from finetune_pipeline.settings import PROJECT_ROOT, load_loops

DOCUMENTS = [
    PROJECT_ROOT / "README.md",
    PROJECT_ROOT / "CONTRIBUTING.md",
    *sorted((PROJECT_ROOT / "docs").rglob("*.md")),
]
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


@pytest.mark.parametrize("document", [*DOCUMENTS, PROJECT_ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links_lead_to_files(document):
    targets = re.findall(r"\]\((?!http|#)([^)#]+)", document.read_text(encoding="utf-8"))
    assert [target for target in targets if not (document.parent / target).exists()] == []


def test_decisions_are_numbered_and_have_a_date_and_a_status():
    text = (PROJECT_ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")
    form = r"^## (\d+)\. \S.*\n\n\d{4}-\d\d-\d\d, (?:accepted|superseded by \d+)\.$"
    numbers = [int(number) for number in re.findall(form, text, re.MULTILINE)]
    assert numbers == list(range(1, text.count("\n## ") + 1))


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
