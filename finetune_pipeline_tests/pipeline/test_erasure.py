"""Erasing a person from Python, as the command does it."""

import pytest

from finetune_pipeline.database import connect
from finetune_pipeline.feedback import FeedbackClient
from finetune_pipeline.pipeline.erasure import erase_person, find_person
from finetune_pipeline.settings import SettingsError, load_loop
from finetune_pipeline_tests.conftest import interaction

LOOP = "aec_parser"


def test_an_erasure_reports_counts_and_the_files_that_still_name_the_person(own_home):
    client = FeedbackClient(LOOP)
    client.thumbs_up(client.log("a wall", "{}", user="ann"), user="bob")
    inbox = load_loop(LOOP).drop_folder
    inbox.mkdir(parents=True)
    (inbox / "log.jsonl").write_text(interaction("a", user="ann").model_dump_json() + "\n")
    earlier = own_home / "journal"  # dead letters of an earlier version
    earlier.mkdir()
    (earlier / "x.refused").write_text('{"user": "ann"}\n')
    held = find_person(connect(), "ann")
    assert sum(one.data.count for one in held) == 2
    result = erase_person(connect(), "ann", held)
    (loop,) = [one for one in result.loops if one.name == LOOP]
    assert (loop.erased.interactions, loop.erased.feedback, result.complete) == (1, 1, True)
    assert loop.files == (inbox / "log.jsonl", earlier / "x.refused")
    assert not any(one.data.count for one in find_person(connect(), "ann"))
    assert client.stats() == {}


def test_only_the_given_loop_is_searched(own_home):
    FeedbackClient(LOOP).log("a wall", "{}", user="ann")
    assert [one.name for one in find_person(connect(), "ann", LOOP)] == [LOOP]
    with pytest.raises(SettingsError, match="nowhere"):
        find_person(connect(), "ann", "nowhere")
