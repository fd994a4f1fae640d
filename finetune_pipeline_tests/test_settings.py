import inspect

import pytest

from finetune_pipeline import settings
from finetune_pipeline.settings import (
    COMPONENT_TYPE,
    LoopSettings,
    SettingsError,
    home,
    load_loop,
    load_loops,
    read_loop,
    the_loop,
    with_loop,
)

MINIMAL = {
    "name": "notes",
    "base_model": "some/model",
    "evaluation": {"benchmark": "notes.jsonl", "metric": "rouge1"},
}


def write(folder, name, text):
    path = folder / name / "defs.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def loop_yaml(attributes):
    return f"type: {COMPONENT_TYPE}\nattributes:\n" + "\n".join(f"  {line}" for line in attributes.splitlines())


YAML = "name: notes\nbase_model: some/model\nevaluation: {benchmark: notes.jsonl, metric: rouge1}\n"


def test_defaults_are_those_that_reading_gives():
    """A loop passed on as JSON, to a child process, has the hashes of the loop in the YAML."""
    wrong = [
        f"{kind.__name__}.{name}"
        for _, kind in inspect.getmembers(settings, inspect.isclass)
        if issubclass(kind, settings.Settings)
        for name, field in kind.model_fields.items()
        if field.annotation is float and type(field.default) is int
    ]
    assert wrong == []
    loop = load_loop("aec_parser")
    assert LoopSettings.model_validate_json(loop.model_dump_json()).model_dump_json() == loop.model_dump_json()


def test_the_default_loop_has_bare_asset_keys():
    loop = load_loop("aec_parser")
    assert loop.prefix == []
    assert (loop.gate.min_gain, loop.trigger.new_examples) == (0.05, 50)


def test_other_loops_are_prefixed_with_their_name():
    assert LoopSettings.model_validate(MINIMAL).prefix == ["notes"]


def test_the_drop_folder_is_under_the_home_by_default(tmp_path):
    assert LoopSettings.model_validate(MINIMAL).drop_folder == home() / "inbox" / "notes"
    named = {**MINIMAL, "ingest": {"drop_folder": str(tmp_path)}}
    assert LoopSettings.model_validate(named).drop_folder == tmp_path


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ("gate: {min_gian: 0.1}", r"gate\.min_gian: unknown setting; did you mean min_gain\?"),
        ("surprise: 1", "surprise"),
        ("training: {epochs: 2}", r"training\.epochs: unknown setting; renamed to num_train_epochs"),
        ("training: {workers: 2}", r"training\.workers: unknown setting; renamed to num_processes"),
        ("training: {trainer_config: {fp16: true}}", r"training: .*trainer_config\.fp16 and bf16 exclude each other"),
        ("gate: {min-gain: 0.1}", r"gate\.min-gain: unknown setting; did you mean min_gain\?"),
        ("feedback: {rating: {}}", r"feedback\.rating: unknown setting; did you mean ratings\?"),
        ("sources: [{kind: files, name: a, paht: b}]", r"sources\[0\]\.paht: unknown setting; did you mean path\?"),
        ("gate: {epochs: 2}", r"gate\.epochs: unknown setting \(line 6\)$"),  # it was a setting of another section
        ("feeds: []", r"feeds: unknown setting; renamed to sources"),
        ("min_gain: 0.1", r"min_gain: unknown setting(?!; did you mean min_gain\?)"),  # it belongs to gate
        ("gate: {min_gain: 7}", r"gate\.min_gain: found 7, expected less than"),
        ("training: {num_train_epochs: many}", "training.num_train_epochs"),
        ("training: {seed: 4294967296}", r"training\.seed: found 4294967296, expected less than 4294967296"),
        ("export: {quantization: Q3_X}", "export.quantization"),
        ("training: {num_train_epochs: .inf}", r"training\.num_train_epochs: found inf"),
        ("training: {learning_rate: .nan}", r"training\.learning_rate: found nan"),
        ("training: {report_to: tensorboard}", r"training\.report_to: found 'tensorboard', expected a list: \[tensor"),
        ("trigger: {nightly: always}", r"trigger\.nightly: found 'always', expected a cron schedule of five fields"),
        ("sources: [{name: a, path: b}]", r"sources\[0\]: kind is missing; expected one of code, documents, files"),
        ("sources: {feeds: []}", r"sources: found a mapping with the keys feeds, expected a list"),
        ("sources: [{kind: file, name: a}]", r"sources\[0\]: unknown kind 'file'; did you mean files\?"),
        ("training: {num_train_epochs: '{{ env.NOT_SET_ANYWHERE }}'}", "NOT_SET_ANYWHERE"),
    ],
)
def test_an_invalid_setting_is_named(tmp_path, addition, message):
    path = write(tmp_path, "notes", loop_yaml(YAML + addition))
    with pytest.raises(SettingsError, match=message):
        read_loop(path)


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ("metric: rouge", r"metric: unknown kind 'rouge'; did you mean rougeL\?"),
        ("metric: {name: a}", r"metric: kind is missing; expected one of parameters, exact,"),
        ("metric: regex", r"metric\.pattern: is missing"),
        ("metrics: rougeL", r"metrics: found 'rougeL', expected a list"),
        ("metric: exact, metrics: [exact]", r"metrics: exact occurs twice in metric and metrics; .* give it a name"),
        ("metrics: [chrf, {kind: parameters, weigths: {a: 1}}]", r"metrics\[1\]\.weigths: .* did you mean weights\?"),
        ("metrics: [{kind: regex, pattern: '('}]", r"metrics\[0\]\.pattern: '\(' is not a regular expression"),
        ("metrics: [{kind: function, function: tone}]", r"metrics\[0\]\.function: .*dotted path such as my_package"),
        (
            "samples: 5, metric: {kind: judge, url: 'http://a', model: m}",
            "samples needs a metric that scores one answer",
        ),
    ],
)
def test_an_invalid_metric_is_named(tmp_path, evaluation, message):
    text = f"name: notes\nbase_model: some/model\nevaluation: {{benchmark: b, {evaluation}}}\n"
    with pytest.raises(SettingsError, match=message):
        read_loop(write(tmp_path, "notes", loop_yaml(text)))


def test_an_unknown_top_level_key_is_named(tmp_path):
    path = write(tmp_path, "notes", loop_yaml(YAML) + "\natributes: 1\n")
    with pytest.raises(SettingsError, match="unknown top-level keys: atributes"):
        read_loop(path)


@pytest.mark.parametrize("time", ["0 2 * * *", "*/5 0-6 1,15 JAN MON-FRI", "@daily"])
def test_schedules_are_cron_times(tmp_path, time):
    assert (
        read_loop(write(tmp_path, "notes", loop_yaml(f"{YAML}trigger: {{nightly: '{time}'}}"))).trigger.nightly == time
    )


def test_the_metric_parameters_needs_an_output_schema(tmp_path):
    path = write(tmp_path, "notes", loop_yaml(YAML.replace("rouge1", "parameters")))
    with pytest.raises(SettingsError, match=r"evaluation\.metric: parameters needs output_schema; set it"):
        read_loop(path)


@pytest.mark.parametrize(
    ("schema", "constrain", "found"),
    [
        (None, None, "none"),
        (None, "none", "none"),
        ("a.json", None, "schema"),
        ("a.json", "schema", "schema"),
        ("a.json", "none", "none"),
    ],
)
def test_decoding_is_constrained_by_default_where_the_loop_has_a_schema(schema, constrain, found):
    loop = LoopSettings.model_validate({**MINIMAL, "output_schema": schema, "serving": {"constrain": constrain}})
    assert loop.constrain == found


def test_constrained_decoding_needs_an_output_schema(tmp_path):
    path = write(tmp_path, "notes", loop_yaml(f"{YAML}serving: {{constrain: schema}}"))
    with pytest.raises(SettingsError, match=r"serving\.constrain: schema needs output_schema; set it, or set"):
        read_loop(path)


@pytest.mark.parametrize(
    ("training", "named"),
    [
        ("trainable_token_indices: all", r"training\.trainable_token_indices"),
        ("use_rslora: true, use_dora: true", r"training\.use_rslora, training\.use_dora"),
        ("lora_config: {bias: all}", r"training\.lora_config\.bias"),
    ],
)
def test_what_a_gguf_adapter_cannot_hold_needs_a_merged_export(tmp_path, training, named):
    addition = f"training: {{{training}}}\nexport: {{form: adapter}}\n"
    with pytest.raises(SettingsError, match=rf"{named} trains; set export\.form: merged"):
        read_loop(write(tmp_path, "notes", loop_yaml(YAML + addition)))


def test_an_unknown_field_of_trl_is_rejected_when_the_loop_is_read(tmp_path):
    path = write(tmp_path, "notes", loop_yaml(YAML + "training: {trainer_config: {neftune_alpha: 5}}"))
    with pytest.raises(SettingsError, match=r"training\.trainer_config: .* did you mean neftune_noise_alpha\?"):
        read_loop(path)


def test_values_from_the_environment_are_converted(tmp_path, monkeypatch):
    monkeypatch.setenv("EPOCHS", "2.5")
    path = write(tmp_path, "notes", loop_yaml(YAML + "training: {num_train_epochs: '{{ env.EPOCHS }}'}"))
    assert read_loop(path).training.num_train_epochs == 2.5


@pytest.mark.parametrize("text", ["- a list\n", "type: something.Else\n", "a: [unclosed\n"])
def test_a_file_that_declares_no_loop_is_rejected(tmp_path, text):
    with pytest.raises(SettingsError, match=r"defs\.yaml"):
        read_loop(write(tmp_path, "notes", text))


@pytest.mark.parametrize(
    ("content", "said"), [(b"a: [unclosed\n", "valid YAML: line 2, column 1: "), (b"\xff\xfe", "UTF-8")]
)
def test_a_malformed_file_among_the_loops_is_named(tmp_path, content, said):
    path = tmp_path / "broken" / "defs.yaml"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=rf"broken/defs\.yaml is not {said}"):
        load_loops([tmp_path])


def test_other_components_in_the_package_are_left_to_dagster(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune_pipeline.settings.DEFS_FOLDER", tmp_path)
    write(tmp_path, "resources", "type: dagster.SomethingElse\n")
    assert load_loops([tmp_path]) == {}


def test_two_loops_cannot_have_the_same_name(tmp_path):
    write(tmp_path, "a", loop_yaml(YAML))
    write(tmp_path, "b", loop_yaml(YAML))
    with pytest.raises(SettingsError, match=r"b/defs\.yaml: the loop in .*a/defs\.yaml is already named 'notes'"):
        load_loops([tmp_path])


def test_an_unknown_loop_is_an_error_that_lists_the_declared_ones():
    with pytest.raises(
        SettingsError,
        match=r"No loop is named 'nobody'\. The loops in .*/defs are: aec_parser\. FINETUNE_LOOPS_DIR is not",
    ):
        load_loop("nobody")
    with pytest.raises(SettingsError, match=r"No loop is named 'aec'\. Did you mean aec_parser\? The loops in"):
        load_loop("aec")


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Return a folder of the user's own loops, with one loop in it."""
    folder = tmp_path / "loops"
    (folder / "notes" / "model").mkdir(parents=True)
    text = loop_yaml(YAML + "ingest: {folders: [logs]}\nsources: [{kind: files, name: old, path: ../old.jsonl}]\n")
    text = text.replace("base_model: some/model", "base_model: model")
    (folder / "notes" / "defs.yaml").write_text(text)
    monkeypatch.setenv("FINETUNE_LOOPS_DIR", str(folder))
    return folder


def test_loops_outside_the_package_are_read_with_paths_relative_to_their_yaml(outside):
    assert list(load_loops()) == ["aec_parser", "notes"]
    loop = load_loop("notes")
    assert loop.base_model == str(outside / "notes" / "model")
    assert loop.log_folders[0] == outside / "notes" / "logs"
    assert loop.sources[0].path == str(outside / "old.jsonl")
    assert load_loop("aec_parser").base_model == "data/starter_model"


def test_a_hugging_face_id_is_no_path_in_a_loop_outside(outside):
    path = outside / "notes" / "defs.yaml"
    path.write_text(path.read_text().replace("base_model: model", "base_model: Qwen/Qwen2.5-0.5B-Instruct"))
    assert load_loop("notes").base_model == "Qwen/Qwen2.5-0.5B-Instruct"


@pytest.mark.parametrize("first", ["", "type: finetune_pipeline.FineTuneLoop\n", "type: another.Component\n", "- a\n"])
def test_a_wrong_or_missing_type_outside_is_named(outside, first):
    (outside / "notes" / "defs.yaml").write_text(first + ("" if first == "- a\n" else "attributes: {}\n"))
    with pytest.raises(SettingsError, match=r"notes/defs\.yaml: expected `type: finetune_pipeline\.orchestration"):
        load_loops()


def test_a_loops_folder_that_does_not_exist_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_LOOPS_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(SettingsError, match=r"FINETUNE_LOOPS_DIR is .*nowhere, which is not a folder"):
        load_loops()


@pytest.mark.parametrize(
    ("moved", "said"),
    [
        ("loops/notes/defs.yml", "holds loops as <loop>/defs.yaml; found notes/defs.yml: rename it to defs.yaml"),
        ("loops/notes/DEFS.YAML", "found notes/DEFS.YAML: rename it to defs.yaml"),
        ("loops/defs.yaml", "found defs.yaml: set the variable to {parent}"),
        ("loops/defs.yml", "found defs.yml: set the variable to {parent}"),
        ("loops/mine/notes/defs.yaml", "found mine/notes/defs.yaml: set the variable to {folder}/mine"),
    ],
)
def test_a_file_that_would_not_be_read_is_named(outside, moved, said):
    """Otherwise the loop would be missing without a word."""
    path = outside.parent / moved
    path.parent.mkdir(exist_ok=True, parents=True)
    (outside / "notes" / "defs.yaml").rename(path)
    with pytest.raises(SettingsError) as error:
        load_loops()
    assert str(error.value).startswith(f"FINETUNE_LOOPS_DIR ({outside}) ")
    assert str(error.value).endswith(said.format(folder=outside, parent=outside.parent))


def test_other_files_in_the_folder_of_loops_do_not_matter(outside):
    for name in ("notes/defs.yml", "notes/defs.yaml.bak", "notes/data.yaml", "README.md", "old/notes/defs.yaml"):
        path = outside / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("anything")
    assert list(load_loops()) == ["aec_parser", "notes"]


def test_without_a_loop_in_the_own_folder_a_command_does_not_take_the_default_one(outside):
    (outside / "notes" / "defs.yaml").unlink()
    assert the_loop("aec_parser").name == "aec_parser"
    with pytest.raises(
        SettingsError, match=r"which has no <loop>/defs\.yaml\. Write one, .* with --loop: aec_parser\."
    ):
        the_loop(None)


def test_the_only_loop_of_the_own_folder_is_the_default(outside, monkeypatch):
    assert the_loop(None).name == "notes"
    assert with_loop("finetune review", load_loop("notes")) == "finetune review"
    assert with_loop("finetune review", load_loop("aec_parser")) == "finetune review --loop aec_parser"


def test_with_two_loops_a_variable_chooses_one(outside, monkeypatch):
    (outside / "mails").mkdir()
    text = (outside / "notes" / "defs.yaml").read_text()
    (outside / "mails" / "defs.yaml").write_text(text.replace("name: notes", "name: mails", 1))
    with pytest.raises(SettingsError, match=r"choose one with --loop or FINETUNE_LOOP: mails, notes"):
        the_loop(None)
    assert with_loop("finetune review", load_loop("notes")) == "finetune review --loop notes"
    monkeypatch.setenv("FINETUNE_LOOP", "notes")
    assert the_loop(None).name == "notes"
    assert the_loop("mails").name == "mails"
    assert with_loop("finetune review", load_loop("notes")) == "finetune review"
    monkeypatch.setenv("FINETUNE_LOOP", "note")
    with pytest.raises(SettingsError, match=r"^FINETUNE_LOOP: No loop is named 'note'. Did you mean notes\?"):
        the_loop(None)


def test_two_loops_of_one_name_are_an_error_wherever_they_are(outside):
    path = outside / "notes" / "defs.yaml"
    path.write_text(path.read_text().replace("name: notes", "name: aec_parser", 1))
    with pytest.raises(SettingsError, match=r"notes/defs\.yaml: the loop in .*aec_parser/defs\.yaml is already named"):
        load_loops()
