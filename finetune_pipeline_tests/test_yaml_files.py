"""YAML that a person would not have written on purpose."""

import pytest
import yaml

from finetune_pipeline.settings import COMPONENT_TYPE, PROJECT_ROOT, SettingsError, read_loop
from finetune_pipeline.yaml_files import YamlError, line_of, load_yaml

BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: the key a is already on line 1"),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", "line 4: the key b is already on line 2"),
        ("- {a: 1, a: 1}\n", "line 1: the key a is already on line 1"),
        ("a: 1\n'a': 2\n", "line 2: the key a is already on line 1"),  # quotes make no difference
        ("yes: 1\ntrue: 2\n", "line 2: the key true is already on line 1"),  # both are true
        ("x: &x {a: 1}\ny: &y {b: 1}\nz:\n  <<: *x\n  <<: *y\n", "line 5: the key << is already on line 4"),
        (BOMB, "has more than 100,000 values; use fewer aliases"),
        ("m: &m {k: &l [1, 2]}\n" + BOMB, "has more than 100,000 values"),
        ("a: &a [*a]\n", "line 1: an alias (*) in this value refers to the value itself"),
        ("a: &a {b: {c: *a}}\n", "line 1: an alias (*) in this value refers to the value itself"),
        ("a: &a\n  <<: *a\n", "refers to the value itself"),
        ("a: &a {<<: &b {<<: *a}}\n", "line 1: an alias (*) in this value refers to the value itself"),
        ("a: &a\n  <<: [{b: 1}, *a]\n", "refers to the value itself"),
        ("a: &a {b: &b {<<: *a}, <<: {c: *b}}\n", "refers to the value itself"),
        ("a: {<<: 3}\n", "expected a mapping or list of mappings for merging"),
        ("a: {<<: [1]}\n", "expected a mapping for merging"),
        ("x: [{a: {b: 1, c: [{d: 1, d: 2}]}}]\n", "line 1: the key d is already on line 1"),
        ("x: &x {a: 1, a: 2}\ny: {<<: *x}\n", "line 1: the key a is already on line 1"),
        ("y: {<<: {a: 1, a: 2}}\n", "line 1: the key a is already on line 1"),
        ("1: a\n0x1: b\n", "line 2: the key 0x1 is already on line 1"),
        ("[" * 5_000, "nested too deeply"),
        ("a: [1, 2\nb: 3\n", "line 2, column 2: while parsing a flow sequence, expected ',' or ']'"),
        ("a: *nobody\n", "line 1, column 4: found undefined alias 'nobody'"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1: expected a single document"),
        ("a: !!python/object:os.system {}\n", "could not determine a constructor"),
        ("[a]: 1\n", "found unhashable key"),
        ("a: \x07\n", "special characters are not allowed"),
        ("a: 2026-02-30\n", "a value cannot be read (day"),
        ("a: 0b_\n", "a value cannot be read"),
        ("a: !!int ''\n", "a value cannot be read"),
        ("a: !!timestamp x\n", "a value cannot be read"),
    ],
)
def test_yaml_that_means_something_else_is_refused(text, message):
    with pytest.raises(YamlError) as error:
        load_yaml(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: 1\n",
        "x: &x {a: 1, b: 2}\ny:\n  <<: *x\n  b: 3\n",  # a key of its own replaces a merged one
        "x: &x [1, 2]\ny: *x\nz: [*x, *x]\n",
        "1: a\n'1': b\n",  # a number and a text
        "a: {b: 1}\nc: {b: 1}\n",
        (PROJECT_ROOT / "finetune_pipeline/defs/aec_parser/defs.yaml").read_text(),
    ],
)
def test_other_yaml_is_read_as_by_pyyaml(text):
    assert load_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            f"type: {COMPONENT_TYPE}\nattributes:\n  training: {{seed: 1}}\n  training: {{seed: 2}}\n".encode(),
            "defs.yaml is not valid YAML: line 4: the key training is already on line 3",
        ),
        (f"type: {COMPONENT_TYPE}\nattributes:\n  a: &a [*a]\n".encode(), "line 3: an alias"),
        (b"type: \xff", "defs.yaml is not UTF-8 (invalid start byte at byte 6); save it as UTF-8"),
    ],
)
def test_a_loops_settings_are_read_so(tmp_path, content, message):
    path = tmp_path / "defs.yaml"
    path.write_bytes(content)
    with pytest.raises(SettingsError) as error:
        read_loop(path)
    assert message in str(error.value)


DOCUMENT = """\
type: a
attributes:
  name: notes
  training:
    lr: 1
  sources:
    - kind: files
      path: a
    - {kind: vault, path: b}
"""


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("attributes.name", 3),
        ("attributes.training.lr", 5),
        ("attributes.training.max_length", 4),  # a missing value is that of its section
        ("attributes.sources[0].path", 8),
        ("attributes.sources[1].path", 9),
        ("attributes.sources[2]", 6),
        ("attributes.name.first", 3),
        ("attributes", 2),
        ("other", None),
    ],
)
def test_the_line_of_a_value_is_found(path, line):
    assert line_of(DOCUMENT, path) == line
