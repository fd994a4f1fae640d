"""What a vault's settings select, how it is asked, and what of the markup is left in an answer."""

import pytest
from pydantic import ValidationError

from finetune_pipeline.sources.source_record import SkippedRecord, SourceError, SourceRecord
from finetune_pipeline.sources.vault import read
from finetune_pipeline.validation_messages import error_message, without_values

from .endpoint import said, teaching
from .test_vault import note_records, source, taken


def written(tmp_path, **notes):
    for name, text in notes.items():
        (tmp_path / f"{name}.md").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    "text",
    ["-", "- ", "- [ ]", "* [ ] \n* [x]", "1.\n2. ", "> - [ ]", "- - -", "---", "|  |  |\n|---|---|\n|  |  |", "...",
     "![[plan.png]]", "- ![[plan.png]]", "![a](b.png) ^id", "<br>", "<div></div>", "- <!-- later -->", "%% later %%",
     "[ ]\n—\n•\n◦ \n☐ ☑", "$$\n$$", "```python\n```", "- ~~~yaml\n  ~~~", "```\n{}\n```", "[[]]\n> [!note]",
     "> [!todo]-\n> - [ ]", "- [ ] - \n\\", "[^1]", "[1]: https://x.org", "<svg><text>a</text></svg>", "???",
     "&nbsp;", "```\n```", "### Why\n-\n### How\n- [ ]", "#decision ^abc"],
)  # fmt: skip
def test_a_section_without_text_is_skipped(text):
    reason = "is selected, but has no text"
    heading, tag = note_records(f"## Decision\n\n{text}\n"), note_records(f"---\ntags: decision\n---\n{text}\n")
    assert (heading, tag) == ([SkippedRecord("Note.md#Decision", reason)], [SkippedRecord("Note.md", reason)])


def test_a_subsection_without_text_leaves_no_heading():
    (record,) = note_records("## Decision\n### Why\n-\n### How\n#### Detail\nBy hand.\n### When\n- [ ]\n")
    assert record.answer == "### How\n\n#### Detail\n\nBy hand."


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Lime paint. #decision ^p1", "Lime paint."),
        ("- Lime paint #decision ^p1\n- Oak", "- Lime paint\n- Oak"),
        ("#decision ^p1\nLime paint.", "Lime paint."),
        ("#decision ![[a.png]]\nLime paint.", "Lime paint."),
        ("Lime paint\n^p1\nand oak.", "Lime paint\nand oak."),
        ("Lime ![[a.png]] paint, ![b](c.png).", "Lime paint,."),
        ("Lime paint\n![[a.png|300]]\nand oak.", "Lime paint\nand oak."),
        ("- ![[a.png]] Lime paint\n- ![[b.png]]\n- Oak", "- Lime paint\n- Oak"),
        ("- Oak\n-\n- [ ]\n  - [ ] \n- Lime", "- Oak\n- Lime"),
        ("1.\n   Oak\n2.", "1.\n   Oak"),
        ("-\n  -\n    Oak", "-\n  -\n    Oak"),
        ("[![a](b.png)](https://x.org) Lime paint. ![a][ref]", "Lime paint."),
        ("Lime^[Not *oak*, see [[Wood|wood]].] paint ^[or oil]", "Lime (Not *oak*, see wood.) paint (or oil)"),
        ("`^[code]` and $x^{[2]}$, Lime", "`^[code]` and $x^{[2]}$, Lime"),
        ("The regex ^[a-z]+$ or ^[^ x]* or ^[a-z ]{3}", "The regex ^[a-z]+$ or ^[^ x]* or ^[a-z ]{3}"),
        ("x^[2] and n^[k+1]", "x^[2] and n^[k+1]"),
        ("Lime^[[[Wood]]] paint^[石灰と木]", "Lime (Wood) paint (石灰と木)"),
        ("Lime<br>paint and<br/>\noak.", "Lime paint and\noak."),
        ('<div class="a">\n<b>Lime</b> <span style="color: red">paint</span>\n</div>', "Lime paint"),
        ("H<sub>2</sub>O, un<em>believ</em>able", "H2O, unbelievable"),
        ('<img src="a.png" width=3> Lime paint <iframe src="https://x.org"></iframe>', "Lime paint"),
        ("<style>\np {}\n</style>\nLime<script>x()</script> paint", "Lime paint"),
        ("<details><summary>Lime</summary>\n\npaint\n\n</details>", "Lime\n\npaint"),
        ("Lime&nbsp;paint &amp; oak &lt; 3 & 4", "Lime\xa0paint & oak < 3 & 4"),
        ("<img src='a>b'>Lime <a title=it's href=x>paint</a> <b class=\"x>y\">oak</b>", "Lime paint oak"),
        ("<custom-el>Lime</custom-el> <font-awesome icon='x'/>paint <foo>oak</foo>", "Lime paint oak"),
        ("Lime <svg width='1'><path d='M0'/><text>a</text></svg> paint <math><mi>x</mi></math>", "Lime paint"),
        ("Lime <path d='M0'/> paint\n<svg>\n<path d='M0'/>\n\noak", "Lime paint\n\noak"),
        ("Lime[^1] paint[^a], oak [^2].\n\n[^1]: See the **book**.", "Lime paint, oak.\n\nSee the **book**."),
        ("[Lime][1] [paint][]\n\n[1]: http://x\n[b]: <a.md> 'c'", "Lime paint"),
        ("> [!note]\n> Lime\n\n> [!tip]- Paint", "> **Note**\n> Lime\n\n> **Paint**"),
        ("✅", "✅"),
        ("[Ann]: yes, x[i][j], [1][2], `[^a-z]`", "[Ann]: yes, x[i][j], [1][2], `[^a-z]`"),
        ("<Name>, a <b, c>, <1>, <ann@x.org>, Map<k, v>", "<Name>, a <b, c>, <1>, <ann@x.org>, Map<k, v>"),
        ("a < b and c > d, List<int>, <https://x.org>", "a < b and c > d, List<int>, <https://x.org>"),
        ("`<b>` and `![[a]]`\n\n```\n<br> ![[a]] ^p1\n```", "`<b>` and `![[a]]`\n\n```\n<br> ![[a]] ^p1\n```"),
    ],
)
def test_markup_is_removed_without_residue(text, answer):
    (record,) = note_records(f"## Decision\n\n{text}\n")
    assert record.answer == answer


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("## Decision\nA\n## Decisions\nB\n",
         ["What did I decide about Note? (Decision)", "What did I decide about Note? (Decisions)"]),
        ("# Note\n## Decision\nA\n# Late\n## Decision\nB\n",
         ["What did I decide about Note?", "What did I decide about Late (Note)?"]),
        ("# A\n## Why?\nx #decision\n# B\n## Why?\ny #decision\n", ["Why? (Note, A)", "Why? (Note, B)"]),
        ("## Decision\nA\n## Decision\nB\n", ["What did I decide about Note?"]),  # one answer
    ],
)  # fmt: skip
def test_sections_of_one_kind_have_different_prompts(text, prompts):
    records = note_records(text)
    assert [record.prompt for record in records] == prompts
    assert "".join(record.answer for record in records).replace("\n", "").endswith(("B", "#decision", "y"))


def test_notes_with_one_title_have_different_prompts(tmp_path):
    note = "---\ntitle: Talk\n---\n#decision\n\n{}\n"
    records, _ = taken(written(tmp_path, a=note.format("one"), b=note.format("two")))
    assert [record.prompt for record in records] == [
        "What did I decide about Talk?",
        "What did I decide about Talk? (b)",
    ]


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("Weg.md", "Wofür war ich dankbar? Thema: Weg"),
        ("2024-05-03.md", "Wofür war ich dankbar am 2024-05-03?"),
        ("2024-05-03 Weg.md", "Wofür war ich dankbar am 2024-05-03? Thema: Weg"),
        ("{day} [x].md", "Wofür war ich dankbar? Thema: {day} [x]"),  # nothing in a title is a placeholder
    ],
)
def test_a_prompt_of_a_kind_is_a_setting(path, prompt):
    prompts = {"dank": "Wofür war ich dankbar[ am {day}]?[ Thema: {topic}]"}
    (record,) = note_records("#dank\n\nRegen.", path, tags={"dank": "dank"}, prompts=prompts)
    assert (record.kind, record.prompt) == ("dank", prompt)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": {"idea": "What about {topic}?"}}, "prompts names the kind idea, but no tag, heading"),
        ({"prompts": {"decision": "What?"}}, "has no {topic}"),
        ({"prompts": {"decision": "What[ about {title}]?"}}, "has {title}; expected {topic}, {day} or {kind}"),
        ({"prompts": {"decision": "What[ about {topic}?"}}, "bracket without its other half"),
        ({"patterns": {"(": "decision"}}, "is not a regular expression"),
    ],
)
def test_an_unusable_setting_is_named(changes, message):
    with pytest.raises(ValidationError) as error:
        source("unused", **changes)
    assert message in error_message(error.value)


@pytest.mark.parametrize(
    ("frontmatter", "kind"),
    [
        ("status: Decided", "decision"),
        ("STATUS: [open, decided]", "decision"),
        ('status: "[[decided]]"', "decision"),
        ("status: [[decided]]", "decision"),
        ('status: "[[Decided|D]]"', "decision"),
        ('status: "[[States/Decided]]"', "decision"),
        ('status: ["[[Open]]", "[[a/b/Decided.md#Now|at last]]"]', "decision"),
        ('status: "[[Outcome 7|decided]]"', "decision"),
        ("status: [[States/Decided|D]]", "decision"),
        ('status: "[[Undecided]]"', None),
        ("til: true", "learning"),
        ("mood: anything", "reflection"),
        ("tags: learning\nstatus: decided", "learning"),  # a tag counts first
        ("status: open", None),
        ("mood:", None),
    ],
)
def test_a_property_selects_a_note(frontmatter, kind):
    properties = {"status": {"decided": "decision"}, "til": {True: "learning"}, "mood": {"*": "reflection"}}
    records = note_records(f"---\n{frontmatter}\n---\nYes.\n", properties=properties)
    assert [record.kind for record in records] == ([kind] if kind else [])


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("It went well. Looking back, too fast.", ["It went well. Looking back, too fast."]),
        ("Looking back, too fast.\n## Plan\nMore.", ["Looking back, too fast."]),
        ("A\n## Week\nLOOKING BACK, ok.\n### More\nB\n## Plan\nC", ["LOOKING BACK, ok."]),
        (
            "## Week\nLooking back, ok.\n### Tasks\n- milk\n### In hindsight\nIn hindsight, no.",
            ["Looking back, ok.", "In hindsight, no."],
        ),
        ("# A\nB\n## Week\nLooking back.\n### Decision\nC", ["Looking back.", "C"]),
        ("## Decision\nLooking back, A.", ["Looking back, A."]),  # and still a decision
        ("```\nlooking back\n```", []),
        ("## Week #private\nLooking back.", []),
        ("Looking ahead.", []),
    ],
)
def test_a_text_pattern_selects_a_section(text, answers):
    records = note_records(text, patterns={"looking back|in hindsight": "reflection"})
    assert [record.answer for record in records] == answers
    assert {record.kind for record in records} <= {"reflection", "decision"}
    assert not [record for record in note_records(text) if record.kind == "reflection"]


def test_a_long_note_is_split_at_its_headings():
    part = "word " * 30
    text = f"#decision\n\nIntro.\n## Why\n{part}\n### Cost\n{part}\n### Time\n{part}\n## How\n-\n## When\nIn June.\n"
    records = note_records(text, max_answer_chars=330)
    assert [(record.provenance, record.prompt, len(record.answer)) for record in records] == [
        ("Note.md", "What did I decide about Note?", 6),
        ("Note.md#Why", "What did I decide about Why (Note)?", 149),
        ("Note.md#Why#Cost", "What did I decide about Cost (Note, Why)?", 149),
        ("Note.md#Why#Time", "What did I decide about Time (Note, Why)?", 149),
        ("Note.md#When", "What did I decide about When (Note)?", 8),
    ]
    assert len(note_records(text)) == 1


CODE = "```python\n" + "\n\n".join(f"x{n} = {n}" for n in range(40)) + "\n```"
TABLE = "| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 60


@pytest.mark.parametrize(
    ("text", "joint", "longest"),
    [
        ("\n\n".join(f"Paragraph {n}: {'lime and oak ' * n}." for n in range(20)), "\n\n", 300),
        ("\n".join(f"- item {n}\n  - below {n}" for n in range(40)), "\n", 300),
        ("\n".join(f"> line {n} of a quotation" for n in range(40)), "\n", 300),
        (" ".join(f"Sentence {n} is short." for n in range(60)), " ", 300),
        ("".join(f"第{n}句话很短。" for n in range(90)), "", 300),
        (f"Before.\n\n{CODE}\n\nAfter.", "\n\n", len(CODE)),
        (f"Before.\n\n{TABLE}\nAfter.", "\n\n", len(TABLE)),
        ("a" * 1_000, "", 1_000),
        (f"First.\n\n{CODE[:-4]}", "\n\n", len(CODE)),  # a block that is not closed
    ],
    ids=["paragraphs", "items", "quotation", "sentences", "Chinese", "code", "table", "one word", "open code"],
)
def test_a_long_text_without_headings_is_split_and_nothing_is_lost(text, joint, longest):
    records = note_records(f"---\ntags: decision\n---\n{text}\n", max_answer_chars=300)
    assert joint.join(record.answer for record in records) == text.rstrip()
    assert max(len(record.answer) for record in records) <= longest
    assert len(records) == 1 or all(record.answer.strip() for record in records)
    assert len({record.prompt for record in records}) == len({record.provenance for record in records}) == len(records)
    numbered = [f"What did I decide about Note? ({n})" for n in range(2, len(records) + 1)]
    assert [record.prompt for record in records] == ["What did I decide about Note?", *numbered]


def test_many_sections_of_one_heading_are_split_too():
    records = note_records(f"## Decision\n{'a' * 80}\n" * 3, max_answer_chars=170)
    assert [(record.provenance, len(record.answer)) for record in records] == [
        ("Note.md#Decision", 162), ("Note.md#Decision [2]", 80),
    ]  # fmt: skip
    assert len({record.prompt for record in records}) == 2


def test_a_vault_that_gives_nothing_says_what_it_has(tmp_path):
    written(
        tmp_path,
        a="---\nstatus: done\ntags: [meeting]\n---\n## Tasks\n- [ ] #todo call\n## Decision\n-\n",
        b="## Tasks\nx\n## Secret plan #private\n### Hidden\n#planted\n",
        c="---\nPLANTED: x\n---\n#private\n## PLANTED\n",
    )
    with pytest.raises(SourceError) as error:
        taken(tmp_path)
    message = str(error.value)
    assert "gives no record: no note or section with text has one of the tags decision, learning, reflection" in message
    assert "(skipped: 1: is selected, but has no text)" in message
    assert "the 2 notes that may be read have the tags '#meeting' (1), '#todo' (1)" in message
    assert "the headings 'Tasks' (2), 'Decision' (1); the properties 'status' (1: 'done'). Map" in message
    assert "`finetune source preview notes`" in message
    # What is personal is quoted, so that it stays out of Dagster's database.
    assert not any(word in without_values(message) for word in ("meeting", "Tasks", "status", "done"))
    assert "planted" not in message.casefold() and "Secret" not in message and "Hidden" not in message


def test_a_teacher_names_the_kind_of_what_nothing_selects(tmp_path):
    long = "We thought that the mill would sell, and it did not, so next time we ask first."
    written(
        tmp_path,
        Day=f"{long}\n## Decision\nBuy it, whatever it may cost us in the end.\n## List\n{long} eggs\n## Short\nx\n",
        Secret=f"#private\n{long}\n",
        Person=f"{long} Write to ann.miller@example.org.\n## Part #private\n{long}\n",
    )

    def redact(text):
        return text.replace("ann.miller@example.org", "[E-MAIL]")

    def script(body, number):
        text = body["messages"][1]["content"]
        reply = "none" if "eggs" in text else "perhaps" if "[" in text else "<think>x</think>Reflection."
        return said(reply)

    with teaching(script) as (server, teacher):
        found = list(read(source(tmp_path, teacher=teacher.model_dump()), None, redact=redact))
    records = [(one.provenance, one.kind, one.prompt) for one in found if isinstance(one, SourceRecord)]
    assert records == [
        ("Day.md#Decision", "decision", "What did I decide about Day?"),
        ("Day.md", "reflection", "What were my thoughts about Day?"),
    ]
    assert [one for one in found if isinstance(one, SkippedRecord)] == [
        SkippedRecord("Person.md", "the teacher did not answer with a kind or none")
    ]
    sent = repr(server.asked)
    assert len(server.asked) == 3 and "Buy it" not in sent and "example.org" not in sent
    with pytest.raises(ValueError, match="pass `redact`"):
        list(read(source(tmp_path, teacher=teacher.model_dump()), None))
