"""A vault of 83 realistic notes: exactly what is read, and what is not."""

import hashlib
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_pipeline.settings import VaultSource
from finetune_pipeline.sources.source_record import SkippedRecord, SourceError, SourceRecord
from finetune_pipeline.sources.text_files import TextFile
from finetune_pipeline.sources.vault import read
from finetune_pipeline.sources.vault.note import NoteRules, read_note

VAULT = Path(__file__).parent / "vault"
TAKEN = {
    "Decisions/ADR 7.md": ("decision", "What did I decide about ADR 7?"),
    "Decisions/ADR 8.md": ("decision", "What did I decide about ADR 8?"),
    "Decisions/Both.md": ("decision", "What did I decide about Both?"),
    "Decisions/Use SQLite for state.md": ("decision", "What did I decide about Use SQLite for the state?"),
    "Decisions/Why do we write tests.md": ("decision", "Why do we write tests first?"),
    "Journal/2024-05-03.md#Friday, 3 May 2024#Reflection": ("reflection", "What were my thoughts on 2024-05-03?"),
    "Journal/2024-05-03.md#Friday, 3 May 2024#Decisions": ("decision", "What did I decide on 2024-05-03?"),
    "Journal/2024-05-04 Saturday.md#Reflections": ("reflection", "What were my thoughts on 2024-05-04?"),
    "Journal/2024-05-06 Talk with Ann.md#Price": (
        "decision",
        "What did I decide about Price (Talk with Ann) on 2024-05-06?",
    ),
    "Journal/2024-05-09.md#Storage#Decision": ("decision", "What did I decide about Storage on 2024-05-09?"),
    "Journal/2024-13-45.md": ("learning", "What did I learn about 2024-13-45?"),
    "Journal/20240505.md": ("reflection", "What were my thoughts on 2024-05-05?"),
    "Odd/BOM.md": ("decision", "What did I decide about BOM?"),
    "Odd/CRLF.md": ("decision", "What did I decide about CRLF?"),
    "Odd/Empty frontmatter.md": ("learning", "What did I learn about Empty frontmatter?"),
    "Odd/Inline comment over lines.md": ("learning", "What did I learn about Inline comment over lines?"),
    "Odd/Number one.md#Decision": ("decision", "What did I decide about Number one?"),
    "Odd/Old Mac.md": ("decision", "What did I decide about Old Mac?"),
    "Odd/SHOUTED.MD": ("decision", "What did I decide about SHOUTED?"),
    "Odd/Tabs.md": ("decision", "What did I decide about Tabs?"),
    "Odd/Unclosed comment.md#Learning": ("learning", "What did I learn about Unclosed comment?"),
    "Odd/YAML objects.md": ("decision", "What did I decide about YAML objects?"),
    "Odd/YAML odd tags.md": ("decision", "What did I decide about YAML odd tags?"),
    "Private/Comment over headings.md#Decision": ("decision", "What did I decide about Comment over headings?"),
    "Private/Part.md#Decision": ("decision", "What did I decide about Part?"),
    "Projects/Bridge/Log.md#Log#Steel or timber": (
        "decision",
        "What did I decide about Steel or timber (Projects/Bridge, Log)?",
    ),
    "Projects/Circle A.md": ("learning", "What did I learn about Circle A?"),
    "Projects/Circle B.md": ("learning", "What did I learn about Circle B?"),
    "Projects/Dashes.md#Decision": ("decision", "What did I decide about Dashes?"),
    "Projects/Heading forms.md#1. Decision: buy the saw": (
        "decision",
        "What did I decide about buy the saw (Heading forms)?",
    ),
    "Projects/Heading forms.md#🧠 Learnings:": ("learning", "What did I learn about Heading forms?"),
    "Projects/Heading forms.md#How did we choose the saw?": ("decision", "How did we choose the saw? (Heading forms)"),
    "Projects/Kinds within.md": ("reflection", "What were my thoughts about Kinds within?"),
    "Projects/Kinds within.md#Work#Decision": ("decision", "What did I decide about Work (Kinds within)?"),
    "Projects/Kinds within.md#Learnings": ("learning", "What did I learn about Kinds within?"),
    "Projects/Markup.md#Bold code and Ann marked": (
        "decision",
        "What did I decide about Bold code and Ann marked (Markup)?",
    ),
    "Projects/Mid sentence.md#Paint": ("decision", "What did I decide about Paint (Mid sentence)?"),
    "Projects/Nested/Deep/Deeper/Deepest/Find.md#Find#Soil": ("learning", "What did I learn about Soil (Find)?"),
    "Projects/Not tags.md#decision": ("decision", "What did I decide about Not tags?"),
    "Projects/Query.md#Learnings": ("learning", "What did I learn about Query?"),
    "Projects/Tower/Log.md#Lift": ("decision", "What did I decide about Lift (Projects/Tower, Log)?"),
    "Projects/Tower/Retrospective.md": ("reflection", "What were my thoughts about Retrospective?"),
    "Projects/Unclosed fence 2.md#Decision": ("decision", "What did I decide about Unclosed fence 2?"),
    "Zettel/202405031230 Clay holds water.md": ("learning", "What did I learn about Clay holds water?"),
    "Zettel/202405031245.md#Sand lets water through": ("learning", "What did I learn about Sand lets water through?"),
    "言語/Café.md": ("learning", "What did I learn about Café?"),
    "言語/Entscheidungen.md#Löschfrist": ("decision", "What did I decide about Löschfrist (Entscheidungen)?"),
    "言語/Решения.md#Вопрос": ("decision", "What did I decide about Вопрос (Решения)?"),
    "言語/عربي.md": ("reflection", "What were my thoughts about عربي?"),
    "言語/データベース.md": ("decision", "What did I decide about データベース?"),
    "言語/😀.md": ("reflection", "What were my thoughts about 😀?"),
}
SKIPPED = {
    "Decisions/No text yet.md": "is selected, but has no text",
    "Journal/2024-05-07.md#Decisions": "is selected, but has no text",
    "Journal/2024-05-07.md#Reflection": "is selected, but has no text",
    "Odd/Broken YAML.md": "its frontmatter is not YAML, line 3; correct it, so that its tags can be read",
    "Odd/Latin-1.md:4": "is not UTF-8 (invalid continuation byte); save it as UTF-8",
    "Odd/NUL.md:1": "contains a null byte; save it as text",
    "Odd/Never closed.md": "its frontmatter is not closed; add a line ---",
    "Odd/Only an image.md": "is selected, but has no text",
    "Odd/Only frontmatter.md": "is selected, but has no text",
    "Odd/UTF-16.md:1": "contains a null byte; save it as text",
    "Odd/YAML keys.md": "its frontmatter has a key that is not text; put it into quotes",
    "Odd/YAML list.md": "its frontmatter is a list, expected `key: value` lines",
    "Odd/YAML text.md": "its frontmatter is text, expected `key: value` lines",
    "Private/Alias.md": "its frontmatter uses a YAML alias (*name); write the value itself",
    "Private/Broken.md": "its frontmatter is not YAML, line 3; correct it, so that its tags can be read",
    "Private/Twice.md": "its frontmatter has a key twice; remove one",
}


def source(path, **changes):
    return VaultSource(kind="vault", name="notes", path=str(path), **changes)


def taken(path, **changes):
    found = list(read(source(path, **changes), None))
    return [one for one in found if isinstance(one, SourceRecord)], [
        one for one in found if isinstance(one, SkippedRecord)
    ]


def note_records(text, path="Note.md", **changes):
    """Return what one note gives."""
    return list(read_note(TextFile(path, text, None), NoteRules(source("unused", **changes)), ""))


@pytest.fixture(scope="module")
def vault(tmp_path_factory):
    """The committed notes, and what no repository holds: links, a pipe, a huge note."""
    root = tmp_path_factory.mktemp("there") / "vault"
    shutil.copytree(VAULT, root)
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "Secret.md").write_text("#decision PLANTED-SECRET outside\n")
    (root / "Links").mkdir()
    (root / "Links" / "Out.md").symlink_to(outside / "Secret.md")
    (root / "Links" / "Folder out").symlink_to(outside)
    (root / "Links" / "In.md").symlink_to(root / "Index.md")
    (root / "Links" / "Round").symlink_to(root)
    (root / "Links" / "Itself.md").symlink_to(root / "Links" / "Itself.md")
    os.mkfifo(root / "Links" / "Pipe.md")
    (root / "Odd" / "Huge.md").write_text("#decision\n" + "All of it.\n" * 1_000_000)
    return root


@pytest.fixture(scope="module")
def found(vault):
    return taken(vault, ignore=("templates", "Meta/Templates"))


def answer(found, provenance):
    return next(record.answer for record in found[0] if record.provenance == provenance)


def test_exactly_these_records_and_prompts_are_read(found):
    assert {record.provenance: (record.kind, record.prompt) for record in found[0]} == TAKEN
    assert len(found[0]) == len(TAKEN)


def test_exactly_these_notes_are_skipped_with_reasons(found):
    link = "is a symbolic link, and links are not followed"
    links = {f"Links/{name}": link for name in ("Out.md", "Folder out", "In.md", "Round", "Itself.md")}
    odd = {"Links/Pipe.md": "is not a regular file", "Odd/Huge.md": "is larger than 1,000,000 bytes (max_note_bytes)"}
    assert {one.provenance: one.reason for one in found[1]} == {**SKIPPED, **links, **odd}


def test_nothing_private_or_outside_is_read(found):
    assert "PLANTED-SECRET" not in repr(found)
    assert sum("PLANTED-SECRET" in path.read_text() for path in (VAULT / "Private").iterdir()) == 11


def test_the_vault_is_not_changed(vault):
    def state():
        files = [path for path in sorted(vault.rglob("*")) if path.is_file() and not path.is_symlink()]
        return [(str(path), path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]

    before = state()
    taken(vault)
    assert state() == before


def test_an_answer_is_the_notes_plain_text(found):
    assert answer(found, "Decisions/Use SQLite for state.md") == (
        "We keep all state in one SQLite file, see how it is saved and the comparison.\n\n"
        "> **Not for a network drive**\n> Locks are not reliable there.\n\n"
        "## Consequences\n\n- no service to install\n- one writer at a time"
    )
    assert answer(found, "Projects/Markup.md#Bold code and Ann marked") == (
        "Text with a Link in it, inside, [outside](https://example.org/a_(b)).\n"
        "Heading here and Note and Note > A > B.\n\n1. one\n   > quoted\n\n"
        "   > **Tip**\n   > folded\n   > ```\n   > [[in code]]\n   > ```"
    )
    assert answer(found, "Projects/Mid sentence.md#Paint") == (
        "We made a decision to go with lime paint, which Ann likes.\n\n"
        "- [x] Order it from the mill\n- [ ] tell everyone"
    )
    assert answer(found, "Projects/Query.md#Learnings") == "Queries are not answers.\n\nAfter it."
    assert answer(found, "Projects/Bridge/Log.md#Log#Steel or timber").endswith("| the mill | 4,000 |")


def test_code_is_unchanged_even_in_an_unclosed_fence(found):
    assert "# decision: not a heading, and #decision no tag\nseen =" in answer(found, "Decisions/ADR 7.md")
    assert answer(found, "Projects/Unclosed fence 2.md#Decision").endswith(
        "```bash\npump --day  # [[stays]]\n## Not a heading"
    )


def test_dashes_in_the_middle_are_neither_frontmatter_nor_heading(found):
    assert answer(found, "Projects/Dashes.md#Decision").startswith(
        "Keep the old door\n---\nIt closes well.\n\n---\n\n- a: 1"
    )


def test_a_private_section_is_cut_out_of_its_decision(found):
    assert answer(found, "Private/Part.md#Decision") == "The roof is red.\n\n### When\n\nIn June."


def test_no_text_is_used_twice(found):
    assert answer(found, "Projects/Kinds within.md") == (
        "The week was long.\n\n## Work\n\nWe moved the saw.\n\n### Rest\n\nCoffee is out."
    )
    assert answer(found, "Projects/Tower/Log.md#Lift") == "One lift with 8 seats.\n\nPainted grey."


def test_comments_are_removed(found):
    assert answer(found, "Odd/Unclosed comment.md#Learning") == "Seen."
    assert "not" not in answer(found, "Odd/Inline comment over lines.md")


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("a %% start\n# B\nHIDDEN\n%% end", "a end"),
        ("a %% b %% c %% d\n# B\n\n```\nHIDDEN\n```\n%% end", "a c end"),
        ("%%\nHIDDEN\n%% mid %% again\n# B\nHIDDEN\n%% end", "mid end"),
        ("first\n- item %% start\n# B\nHIDDEN %%\nlast", "first\n- item\nlast"),
        ("## When %% start\n# B\nHIDDEN\n%%\nIn June.", "## When\n\nIn June."),
        ("`%%` marks it\n## B\nseen", "`%%` marks it\n\n## B\n\nseen"),
        ("a `code\nb %% c`\n# B\nHIDDEN\n%% end", "a `code\nb end"),
        ("``` %%\ncode %%\n```\n## B\nseen", "``` %%\ncode %%\n```\n\n## B\n\nseen"),
        ("    code %%\n\n## B\nseen", "    code %%\n\n## B\n\nseen"),
        ("a <!-- %% --> b\n## B\nseen", "a b\n\n## B\n\nseen"),
    ],
)
def test_a_comment_hides_everything_up_to_its_end(text, read):
    (record,) = note_records(f"# Decision\n{text}\n")
    assert record.answer == read


@pytest.mark.parametrize("name", ["CRLF", "BOM", "Old Mac"])
def test_line_ends_and_byte_order_marks_change_nothing(found, name):
    text = answer(found, f"Odd/{name}.md")
    assert "\r" not in text and "\ufeff" not in text and "---" not in text


@pytest.mark.parametrize(
    ("provenance", "moment"),
    [
        ("Decisions/Use SQLite for state.md", datetime(2024, 3, 11, tzinfo=UTC)),
        ("Decisions/ADR 7.md", datetime(2024, 5, 2, 7, 30, tzinfo=UTC)),
        ("Journal/20240505.md", datetime(2024, 5, 5, tzinfo=UTC)),
        ("Journal/2024-05-09.md#Storage#Decision", datetime(2024, 5, 9, tzinfo=UTC)),  # its frontmatter has no date
    ],
)
def test_the_time_is_that_of_the_frontmatter_or_the_name(found, provenance, moment):
    assert next(record.created_at for record in found[0] if record.provenance == provenance) == moment


def test_the_time_is_otherwise_that_of_the_file(tmp_path):
    (tmp_path / "a.md").write_text("#decision\n\nYes.\n")
    os.utime(tmp_path / "a.md", (1_700_000_000, 1_700_000_000))
    assert taken(tmp_path)[0][0].created_at == datetime.fromtimestamp(1_700_000_000, UTC)


def test_complete_daily_notes_are_reflections_if_set(vault):
    records, _ = taken(vault, whole_daily_notes=True)
    said = {record.provenance: record.answer for record in records if record.kind == "reflection"}
    assert said["Journal/2024-05-08.md"] == "Walked to the mill."
    assert "Index.md" not in said
    assert "Timber" not in said["Journal/2024-05-03.md"]  # a decision, and a separate record


def test_tags_and_headings_are_settings():
    note = "## Gelernt\n\nSand.\n\n## Weg #Idee/neu\n\nUm den See.\n\n## Decision\n\nNo.\n"
    records = note_records(note, tags={"#idee": "idea"}, headings={"gelernt": "learning"}, private_tags=())
    assert [(one.kind, one.prompt, one.answer) for one in records] == [
        ("learning", "What did I learn about Note?", "Sand."),
        ("idea", 'What did I note under "idea" about Weg (Note)?', "Um den See."),
    ]


def test_a_folder_without_notes_is_an_error(tmp_path):
    with pytest.raises(SourceError, match="does not exist; correct `path`"):
        taken(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="contains no note"):
        taken(tmp_path)
    (tmp_path / "Note.txt").touch()
    with pytest.raises(SourceError, match=r"Note\.txt is not a folder; correct `path`"):
        taken(tmp_path / "Note.txt")


@pytest.mark.parametrize("name", ["templates", "_Templates", "TEMPLATES"])
def test_template_folders_are_left_out_in_any_case(tmp_path, name):
    (tmp_path / name).mkdir()
    for folder in (tmp_path, tmp_path / name):
        (folder / "Note.md").write_text("#decision\n\nWe buy it.\n")
    records, skipped = taken(tmp_path)
    assert [record.provenance for record in records] == ["Note.md"] and not skipped


def test_a_note_that_disappears_meanwhile_is_reported(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.md").write_text(f"#decision\n\n{name}\n")
    reading = read(source(tmp_path), None)
    next(reading)
    (tmp_path / "b.md").unlink()
    named, rest = reading
    assert named == SkippedRecord(
        "b.md", "cannot be read: No such file or directory", unreadable=True
    )  # its disk may be gone
    assert rest.answer == "c"
    reading = read(source(tmp_path), None)
    next(reading)
    shutil.rmtree(tmp_path)
    with pytest.raises(SourceError, match="disappeared while"):
        list(reading)


def test_a_note_that_became_a_link_meanwhile_is_not_followed(tmp_path):
    root = tmp_path / "vault"
    root.mkdir()
    (tmp_path / "outside.md").write_text("#decision PLANTED-SECRET\n")
    for name in ("a", "b"):
        (root / f"{name}.md").write_text(f"#decision\n\n{name}\n")
    reading = read(source(root), None)
    next(reading)
    (root / "b.md").unlink()
    (root / "b.md").symlink_to(tmp_path / "outside.md")
    (one,) = reading
    assert one.provenance == "b.md" and "cannot be read" in one.reason


def test_a_name_that_is_not_utf_8_is_reported(tmp_path):
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.md")).write_text("#decision\n\nYes.\n")
    except OSError:
        pytest.skip("this file system takes no such name")
    (tmp_path / "a.md").write_text("#decision\n\nYes.\n")
    records, skipped = taken(tmp_path)
    assert [record.provenance for record in records] == ["a.md"]
    assert skipped == [SkippedRecord("\ufffd.md", "its name is not UTF-8; rename it")]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("head", ["a: " + "[" * 50_000, "a: &a [b]\nc: " + "[" + "*a," * 20_000 + "]", "- " * 30_000])
def test_a_malicious_frontmatter_is_reported(head):
    (one,) = note_records(f"---\n{head}\n---\nText.\n")
    assert isinstance(one, SkippedRecord) and len(one.reason) < 100


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "piece",
    [
        "[a](",
        "![",
        "[[a",
        "<!--",
        "`` ` ",
        "%%a\n",
        "#a ",
        "> [!a",
        "==a",
        " ^a",
        "a" + " " * 999,
        "<b ",
        "<script ",
        "<svg ",
        '<b "',
        "<b '> \"",
        "<x y='",
        '<x y="<1',
        "<b a\" ' ",
        "[^a",
        "[a][",
        "[a]: b ",
        "[a]: /b '",
        "&a",
        "- ",
        "[![a](b)",
        "<br>",
        "![[a]] ",
        "%% %%" + " " * 999,
        "1) [ ] ",
    ],
)
def test_a_malicious_note_takes_linear_time(piece):
    note_records("#decision\n\n" + piece * (300_000 // len(piece)) + "x")


PIECES = st.sampled_from(
    [
        "---\n",
        "tags: decision\n",
        "#decision",
        "## Decision\n",
        "# ",
        "#",
        "[[",
        "]]",
        "![[",
        "|",
        "%%",
        "```\n",
        "`",
        ">",
        "> [!note] ",
        "- ",
        "    ",
        "\t",
        "\n",
        "\n\n",
        "\r\n",
        "^id\n",
        "==",
        "<!--",
        "-->",
        "(",
        ")",
        "\\",
        "é",
        "漢",
        "\u2028",
    ]
)
NOTES = st.lists(PIECES | st.text(max_size=8), max_size=40).map("".join)


@settings(max_examples=400, deadline=None)
@given(NOTES)
def test_any_note_gives_records_or_a_reason(text):
    for one in note_records(text):
        assert one.provenance.startswith("Note.md")
        if isinstance(one, SourceRecord):
            assert one.prompt.strip() and one.answer.strip() and one.kind in {"decision", "learning", "reflection"}


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes_in_a_note_leave_the_others_readable(tmp_path_factory, content):
    root = tmp_path_factory.mktemp("bytes")
    (root / "a.md").write_bytes(content)
    (root / "b.md").write_text("#decision\n\nYes.\n")
    assert [record.answer for record in taken(root)[0]][-1] == "Yes."


MARKS = st.sampled_from(
    ["#private", "#Private", "#private/health", "`#private`", "%% #private %%", "<!-- #private -->"]
)
HARMLESS = st.lists(
    st.sampled_from(
        ["## Decision\n", "### More #decision\n", "# Learnings\n", "text\n", "- a\n", "> b\n", "\n", "%% c %%\n"]
    ),
    max_size=8,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(before=HARMLESS, mark=MARKS, level=st.integers(1, 6), inside=NOTES, after=HARMLESS)
def test_a_private_section_never_leaks(before, mark, level, inside, after):
    # The section's own text ends at the next heading.
    inside = inside.replace("#", "").replace("\n---", "")
    section = f"\n\n{'#' * level} Part {mark}\n\n{inside}\nPLANTED-SECRET {inside}\n\n"
    assert "PLANTED-SECRET" not in repr(note_records(f"{before}{section}{after}", whole_daily_notes=True))


@settings(max_examples=200, deadline=None)
@given(
    head=st.sampled_from(
        [
            "tags: [decision, private]",
            "tags: private",
            "tag: decision Private",
            "tags:\n- '#private/x'\n- decision",
            "tags: [[private]]",
            "tags: decision #private",
            "TAGS: {a: private}",
            "tags: [private",
            "tags: private\ntags: decision",
        ]
    ),
    body=NOTES,
)
def test_a_private_note_never_leaks(head, body):
    assert "PLANTED-SECRET" not in repr(
        note_records(f"---\n{head}\n---\n#decision PLANTED-SECRET {body}\nPLANTED-SECRET")
    )
