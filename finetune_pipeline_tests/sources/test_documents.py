"""Document sources: filled templates, artifacts of a teacher, and what is rejected."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_pipeline.settings import PROJECT_ROOT, DocumentsSource
from finetune_pipeline.sources.documents import block_problem, fill, form_problem, parse_template, read
from finetune_pipeline.sources.note_extraction import PLACEHOLDERS, extract_facts
from finetune_pipeline.sources.source_record import SourceError
from finetune_pipeline_tests.curation.default_redaction import redact

from .endpoint import said, teaching
from .read_source import taken

EXAMPLES = PROJECT_ROOT / "examples" / "documents"
FLOW = '---\nname: flow\ninstruction: Draw the topics of "{title}".\n---\n```mermaid\nflowchart TD\n{flow}\n```\n'
NOTE = (
    "# The reading room\n\n## Opening\n\nThe reading room opens in May.\n\n## Booking\n\nVisitors must book a seat.\n"
)


@pytest.fixture
def folders(tmp_path):
    """Write documents and templates; gives the source of them."""

    def write(documents, templates=None, **fields):
        for folder, files in (
            ("notes", documents),
            ("templates", {"flow.md": FLOW} if templates is None else templates),
        ):
            for name, content in files.items():
                path = tmp_path / folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
        given = {"path": str(tmp_path / "notes"), "templates": str(tmp_path / "templates"), **fields}
        return DocumentsSource(kind="documents", name="notes", **given)

    return write


def test_the_examples_give_a_diagram_an_api_document_and_a_data_model():
    source = DocumentsSource(
        kind="documents", name="notes", path=f"{EXAMPLES}/notes", templates=f"{EXAMPLES}/templates"
    )
    records, skipped = taken(read, source)
    assert set(records) == {
        f"orders.md::{name}" for name in ("api", "data_model", "flow", "sequence")
    } | {"kickoff.txt::data_model", "kickoff.txt::sequence"}  # fmt: skip
    assert skipped["kickoff.txt::api"] == "the document names no endpoints, which the template needs"
    sequence = records["kickoff.txt::sequence"]
    assert sequence.prompt.startswith('Make a list of who takes part in "Kick-off of the reading room"')
    assert "Visitors must book a seat one day ahead." in sequence.prompt
    assert sequence.answer.splitlines()[1:4] == [
        "sequenceDiagram", "    participant p1 as Cleo", "    participant p2 as Dan",
    ]  # fmt: skip
    assert sequence.kind == "sequence"
    assert "- GET /orders/{id}" in records["orders.md::api"].answer
    assert "    ORDER {\n        string number\n" in records["orders.md::data_model"].answer


def test_facts_in_fixed_forms_are_found():
    known = extract_facts(
        "T",
        "Attendees: **Ana**, Ben and Cleo\n\nWe met in the garden to talk about it.\n\n## Next steps\n"
        "- [ ] Ben writes it up\n"
        "Decision: no fees\nAs a visitor, I want to book a seat.\nThe API has `DELETE /seats/{id}`.\n"
        "Each seat has a number and a room.\n",
    )
    assert known["actors"] == "- Ana\n- Ben\n- Cleo\n- visitor"
    assert known["summary"] == "We met in the garden to talk about it."
    assert (known["actions"], known["decisions"]) == ("- Ben writes it up", "- no fees")
    assert (known["requirements"], known["endpoints"]) == (
        "- As a visitor, I want to book a seat", "- DELETE /seats/{id}",
    )  # fmt: skip
    assert known["entities"] == "- seat: number, room"
    assert set(known) == PLACEHOLDERS


def test_a_document_cannot_inject_placeholders():
    note = "# {title.__class__} {actors} {0}\n\nAttendees: {title}, ${HOME}, %(title)s\n\nNo more was said.\n"
    form = "{actors}\n{title.__class__} {unknown} {{title}}"
    known = extract_facts("{actors} {0.real}", note)
    assert fill(form, known) == "- {title}\n- ${HOME}\n- %(title)s\n{title.__class__} {unknown} {{actors} {0.real}}"


@given(st.text(), st.lists(st.text(alphabet="ab `~#[]\"'{}()|;:%\n-end", max_size=30), max_size=5))
def test_no_document_breaks_the_form_of_a_template(title, topics):
    document = "".join(
        f"## {topic}\n- {topic}\nAttendees: {topic}\nA {topic} has {topic}, {topic}\n" for topic in topics
    )
    known = extract_facts(title, f"{title}\n{document}")
    for name in ("flow", "participants", "mindmap", "entity_blocks", "sections", "points", "entities"):
        form = f"## Part\n\n```mermaid\nflowchart TD\n{{{name}}}\n```\n"
        filled = fill(form, known)
        assert (form_problem(filled, form), block_problem(filled)) == ("", "")
        assert filled.count("```") == 2


@pytest.mark.parametrize(
    ("content", "provenance", "reason"),
    [
        (b"caf\xe9 and a good deal more of what was said", "bad.md:1", "not UTF-8"),
        (b"a\0b" * 40, "bad.md:1", "null byte"),
        ("", "bad.md", "too short"),
        ("x" * 300_000, "bad.md", "larger than"),
        ("No topic at all is named in this note, which is plain.", "bad.md::flow", "names no flow"),
    ],
)
def test_unusable_documents_are_skipped_and_the_others_are_read(folders, content, provenance, reason):
    records, skipped = taken(
        read, folders({"bad.md": content, "good.md": NOTE, "data.bin": b"\0", ".obsidian/x.md": NOTE})
    )
    assert list(records) == ["good.md::flow"]
    assert list(skipped) == [provenance]
    assert reason in skipped[provenance]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("no front matter {title}", "has no front matter"),
        ("---\nname: [\n---\n{title}", "has no front matter"),
        ("---\n- a\n---\n{title}", "has no front matter"),
        ("---\nname: ../up\ninstruction: x\n---\n{title}", "`name`"),
        ("---\nname: a\n---\n{title}", "`instruction`"),
        ("---\nname: a\ninstruction: x\ncommand: rm\n---\n{title}", "command: only"),
        ("---\nname: a\ninstruction: x\n---\nNothing {unknown}", "contains no placeholder"),
        ("---\nname: a\ninstruction: x\n---\n```mermaid\nflowchat TD\n{flow}\n```", "no known diagram: 'flowchat'"),
        ("---\nname: a\ninstruction: x\n---\n```mermaid\nflowchart TD\n{flow}\n", "without an end"),
    ],
)
def test_an_unusable_template_has_a_reason(template, reason):
    assert reason in parse_template(template)


def test_a_broken_template_is_skipped_and_without_a_good_one_is_an_error(folders):
    second = FLOW.replace("Draw", "Paint")
    records, skipped = taken(read, folders({"a.md": NOTE}, {"a.md": FLOW, "b.md": second, "c.md": "broken"}))
    assert list(records) == ["a.md::flow"]
    assert set(skipped) == {"template b.md", "template c.md"}
    with pytest.raises(SourceError, match="no usable template"):
        taken(read, folders({}, {"a.md": "broken", "b.md": "broken"}))
    with pytest.raises(SourceError, match="cannot be read"):
        taken(read, folders({}, path="/nowhere/at/all"))


def test_templates_among_the_documents_are_not_documents(folders, tmp_path):
    source = folders({"a.md": NOTE, "forms/flow.md": FLOW}, {})
    (tmp_path / "outside.md").write_text(NOTE)
    (Path(source.path) / "link.md").symlink_to(tmp_path / "outside.md")
    records, skipped = taken(read, source.model_copy(update={"templates": f"{source.path}/forms"}))
    assert list(records) == ["a.md::flow"]
    assert list(skipped) == ["link.md"]


DIAGRAM = "```mermaid\nflowchart TD\n    a[Opening in May] --> b[Booking a seat]\n```"


def read_with_teacher(folders, answer, documents=None, template=FLOW):
    with teaching(lambda body, number: said(answer)) as (server, settings):
        source = folders(documents or {"a.md": NOTE}, {"t.md": template}, teacher=settings.model_dump())
        return *taken(read, source, redact=lambda text: redact(text).text), server


@pytest.mark.parametrize("answer", [DIAGRAM, f"````markdown\n{DIAGRAM}\n````", f"Here it is:\n\n{DIAGRAM}"])
def test_a_teacher_writes_the_artifact_in_the_form_of_the_template(folders, answer):
    records, skipped, server = read_with_teacher(folders, answer)
    assert skipped == {}
    record = records["a.md::flow"]
    assert DIAGRAM in record.answer
    assert "````" not in record.answer
    assert record.prompt == f'Draw the topics of "The reading room".\n\n{NOTE.strip()}'
    assert "flowchart TD\n{flow}" in server.asked[0]["messages"][1]["content"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("The reading room opens in May, and visitors must book.", "has no mermaid block"),
        (DIAGRAM.replace("flowchart", "flowchat"), "no flowchart diagram"),
        (DIAGRAM.replace("flowchart TD", "sequenceDiagram"), "no flowchart diagram"),
        (DIAGRAM + "\n```json\n{}", "without an end"),
        (DIAGRAM + "\n```mermaid\nboat\n```", "no known diagram: 'boat'"),
        (DIAGRAM + "\n```json\n{,}\n```", "not JSON"),
        (DIAGRAM.replace("Opening in May", "{flow}"), "placeholders left"),
        ("```mermaid\nflowchart TD\n  x[Sun] --> y[Moon]\n```", "not about the document"),
        (NOTE, "copy of the document"),
        ("I'm sorry, I can't do that.", "refused"),
    ],
)
def test_an_unusable_artifact_is_rejected(folders, answer, reason):
    records, skipped, _ = read_with_teacher(folders, answer)
    assert records == {}
    assert reason in skipped["a.md::flow"]


def test_the_headings_of_a_template_are_kept(folders):
    template = "---\nname: api\ninstruction: Write it.\n---\n# {title}\n\n## Endpoints\n\n{endpoints}\n"
    answer = "# Reading room\n\nVisitors book a seat in the reading room, which opens in May."
    records, skipped, _ = read_with_teacher(folders, answer, template=template)
    assert (records, list(skipped)) == ({}, ["a.md::api"])
    assert "lacks the heading '## Endpoints'" in skipped["a.md::api"]
    answer += "\n\n##  Endpoints\n\nnone"
    assert "a.md::api" in read_with_teacher(folders, answer, {"a.md": NOTE + "More."}, template)[0]


def test_a_missing_fact_of_the_instruction_sends_no_request(folders):
    template = FLOW.replace("{title}", "{decisions}")
    records, skipped, server = read_with_teacher(folders, DIAGRAM, template=template)
    assert (records, server.asked) == ({}, [])
    assert skipped == {"a.md::flow": "the document names no decisions, which the template needs"}


def test_personal_data_of_a_note_is_not_sent_to_a_teacher(folders):
    note = f"{NOTE}\nWrite to ana.lind@example.org, password: Sommer2024! and so on.\n"
    records, _, server = read_with_teacher(folders, DIAGRAM, {"a.md": note})
    sent = json.dumps(server.asked)
    assert len(server.asked) == 1
    assert "ana.lind" not in sent
    assert "Sommer2024" not in sent
    assert "[EMAIL]" in records["a.md::flow"].prompt
