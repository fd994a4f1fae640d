"""The commands, targets and files that the docs name exist."""

import re
import shutil

import pytest
import yaml

from finetune_pipeline.cli.main import finetune
from finetune_pipeline.settings import DEFS_FOLDER, PROJECT_ROOT, load_loops

DOCUMENTS = [
    PROJECT_ROOT / "README.md",
    PROJECT_ROOT / "CONTRIBUTING.md",
    *sorted((PROJECT_ROOT / "docs").glob("*.md")),
]
README = DOCUMENTS[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_the_docs_exist(document):
    for words in re.findall(r"(?:\.venv/bin/|`)finetune ([a-z][a-z |]*)", document.read_text(encoding="utf-8")):
        first, *rest = re.split(r"[ |]+", words.strip())
        command = finetune.commands.get(first)
        assert command is not None, f"finetune {first}"
        if first == "model":
            assert {word for word in rest if word} <= set(command.commands) | {"v"}, words


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z-]+)`?", README))))
def test_make_targets_in_the_readme_exist(target):
    makefile = (PROJECT_ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_links_in_the_readme_lead_to_files():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (PROJECT_ROOT / target).exists(), target


def test_the_readmes_steps_to_a_second_loop_work(tmp_path):
    defs = tmp_path / "defs"
    shutil.copytree(DEFS_FOLDER, defs)
    (defs / "meeting_notes").mkdir()
    shutil.copy(PROJECT_ROOT / "examples" / "meeting_notes" / "defs.yaml", defs / "meeting_notes")
    assert list(load_loops(defs)) == ["aec_parser", "meeting_notes"]


def test_the_workspace_names_the_code_location():
    for path in [*(PROJECT_ROOT / ".github" / "workflows").glob("*.yml"), PROJECT_ROOT / "workspace.yaml"]:
        assert yaml.safe_load(path.read_text(encoding="utf-8"))
    workspace = yaml.safe_load((PROJECT_ROOT / "workspace.yaml").read_text())["load_from"][0]["python_module"]
    pyproject = (PROJECT_ROOT / "pyproject.toml").read_text()
    assert workspace["module_name"] == "finetune_pipeline.definitions"
    assert pyproject.count(f'code_location_name = "{workspace["location_name"]}"') == 2
