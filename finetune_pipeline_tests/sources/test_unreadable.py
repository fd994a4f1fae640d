"""Empty folders and unreadable files and folders: neither means that earlier records are gone."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from finetune_pipeline.pipeline.source_sync import reader_for
from finetune_pipeline.settings import CodeSource, DocumentsSource, FilesSource, RedactionSettings, VaultSource
from finetune_pipeline.sources.source_record import SkippedRecord, SourceError, SourceRecord

from .test_documents import FLOW, NOTE

CODE = 'def area(a: float) -> float:\n    """The area of a square."""\n    return a * a\n'
USABLE = {
    "files": ("jsonl", '{"prompt": "p", "completion": "c"}\n'),
    "vault": ("md", "#decision\n\nWe buy it.\n"),
    "code": ("py", CODE),
    "documents": ("md", NOTE),
}


@pytest.fixture
def root():
    """A folder that every user may read; the tests drop root, which may read everything."""
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


@pytest.fixture(params=USABLE)
def source(request, root):
    kinds = {"files": FilesSource, "vault": VaultSource, "code": CodeSource, "documents": DocumentsSource}
    (root / "forms").mkdir()
    (root / "forms" / "flow.md").write_text(FLOW)
    (root / "in").mkdir()
    more = {"templates": str(root / "forms")} if request.param == "documents" else {}
    return kinds[request.param].model_validate({"kind": request.param, "name": "own", "path": str(root / "in"), **more})


def test_an_empty_folder_is_an_error(source):
    with pytest.raises(SourceError, match=r"found no|contains no note"):
        list(reader_for(source, RedactionSettings())(source, None))


def test_closed_files_and_folders_are_reported_as_unreadable(source, root):
    suffix, text = USABLE[source.kind]
    for folder in ("in", "in/open", "in/closed"):
        (root / folder).mkdir(exist_ok=True)
        (root / folder / f"a.{suffix}").write_text(text)
    (root / "in" / f"b.{suffix}").write_text(text)
    assert len(list(reader_for(source, RedactionSettings())(source, None))) == 4
    (root / "in" / f"b.{suffix}").chmod(0)
    (root / "in" / "closed").chmod(0)
    with nobody():
        found = list(reader_for(source, RedactionSettings())(source, None))
    assert sum(isinstance(one, SourceRecord) for one in found) == 2
    assert {one.provenance: one.unreadable for one in found if isinstance(one, SkippedRecord)} == {
        f"b.{suffix}": True,
        "closed": True,
    }


def test_files_of_a_folder_that_can_only_be_listed_are_unreadable(root):
    for folder in ("in", "in/listed"):
        (root / folder).mkdir()
        (root / folder / "a.jsonl").write_text(USABLE["files"][1])
    (root / "in" / "link.jsonl").symlink_to("listed/a.jsonl")
    (root / "in" / "listed").chmod(0o744)
    source = FilesSource(kind="files", name="own", path=str(root / "in"))
    with nobody():
        found = list(reader_for(source, RedactionSettings())(source, None))
    assert [one.provenance for one in found if isinstance(one, SkippedRecord) and one.unreadable] == [
        "link.jsonl",
        "listed/a.jsonl",
    ]
