"""Folders that are empty, and what cannot be looked into: neither says that what was there is gone."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from finetune_pipeline.pipeline.source_sync import reader_for
from finetune_pipeline.settings import CodeSource, DocumentsSource, FilesSource, VaultSource
from finetune_pipeline.sources.source_record import SkippedRecord, SourceError, SourceRecord

from .test_documents import FLOW, NOTE

CODE = 'def area(a: float) -> float:\n    """The area of a square."""\n    return a * a\n'
TAUGHT = {
    "files": ("jsonl", '{"prompt": "p", "completion": "c"}\n'),
    "vault": ("md", "#decision\n\nWe buy it.\n"),
    "code": ("py", CODE),
    "documents": ("md", NOTE),
}


@pytest.fixture
def root():
    """A folder that every user of the machine may read, since root reads what is closed, too."""
    folder = Path(tempfile.mkdtemp(prefix="finetune-unreadable-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextmanager
def nobody():
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture(params=TAUGHT)
def source(request, root):
    kinds = {"files": FilesSource, "vault": VaultSource, "code": CodeSource, "documents": DocumentsSource}
    (root / "forms").mkdir()
    (root / "forms" / "flow.md").write_text(FLOW)
    (root / "in").mkdir()
    more = {"templates": str(root / "forms")} if request.param == "documents" else {}
    return kinds[request.param].model_validate({"kind": request.param, "name": "own", "path": str(root / "in"), **more})


def test_an_empty_folder_is_an_error_and_no_source_that_has_nothing(source):
    with pytest.raises(SourceError, match=r"lies in|contains no note"):
        list(reader_for(source)(source, None))


def test_what_cannot_be_looked_into_is_named_and_said_to_be_unseen(source, root):
    suffix, text = TAUGHT[source.kind]
    for folder in ("in", "in/open", "in/closed"):
        (root / folder).mkdir(exist_ok=True)
        (root / folder / f"a.{suffix}").write_text(text)
    (root / "in" / f"b.{suffix}").write_text(text)
    assert len(list(reader_for(source)(source, None))) == 4
    (root / "in" / f"b.{suffix}").chmod(0)
    (root / "in" / "closed").chmod(0)
    with nobody():
        found = list(reader_for(source)(source, None))
    assert sum(isinstance(one, SourceRecord) for one in found) == 2
    assert {one.provenance: one.unreadable for one in found if isinstance(one, SkippedRecord)} == {
        f"b.{suffix}": True,
        "closed": True,
    }


def test_a_folder_of_rows_whose_names_alone_can_be_listed_is_unseen(root):
    for folder in ("in", "in/listed"):
        (root / folder).mkdir()
        (root / folder / "a.jsonl").write_text(TAUGHT["files"][1])
    (root / "in" / "listed").chmod(0o744)
    source = FilesSource(kind="files", name="own", path=str(root / "in"))
    with nobody():
        found = list(reader_for(source)(source, None))
    assert [one.provenance for one in found if isinstance(one, SkippedRecord) and one.unreadable] == ["listed/a.jsonl"]
