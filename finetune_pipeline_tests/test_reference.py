"""The generated references equal what their script writes, and the schema accepts every loop in the repository."""

import runpy

import jsonschema
import pytest
import yaml

from finetune_pipeline.settings import PROJECT_ROOT, load_loops

script = runpy.run_path(str(PROJECT_ROOT / "scripts" / "make_reference.py"))
LOOPS = [*PROJECT_ROOT.glob("finetune_pipeline/defs/*/defs.yaml"), *PROJECT_ROOT.glob("examples/*/defs.yaml")]


@pytest.mark.parametrize("path", script["references"](), ids=lambda path: path.name)
def test_a_reference_is_current(path):
    assert path.read_text(encoding="utf-8") == script["references"]()[path], "run scripts/make_reference.py"


@pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.parent.name)
def test_the_schema_accepts_the_loops(path):
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(script["defs_schema"]()).validate(document)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"gate": {"min_gian": 0.1}}, ["attributes", "gate"]),
        ({"gate": {"min_gain": "much"}}, ["attributes", "gate", "min_gain"]),
    ],
)
def test_the_schema_finds_a_wrong_setting(change, place):
    document = yaml.safe_load(LOOPS[0].read_text(encoding="utf-8"))
    document["attributes"] |= change
    errors = list(jsonschema.Draft202012Validator(script["defs_schema"]()).iter_errors(document))
    assert [list(error.absolute_path) for error in errors] == [place]


@pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.parent.name)
def test_the_examples_name_the_schema(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (path.parent / first.partition("=")[2]).resolve() == PROJECT_ROOT / "finetune_pipeline" / "defs.schema.json"


def test_the_loops_of_the_project_can_be_loaded():
    assert load_loops()
