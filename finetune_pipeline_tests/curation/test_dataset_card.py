"""The card and provenance.csv of datasets that were built."""

import csv

from finetune_pipeline.curation.dataset_card import card_sample, dataset_card
from finetune_pipeline.curation.dataset_files import PROVENANCE_FILE, SPLITS, DatasetExample
from finetune_pipeline_tests.conftest import dataset_rows

from .datasets import POLICY, build, example, replay_example


def card_of(*examples):
    inputs = {"inputs": {"raw_logs": "abc"}, "settings": {"min_reward": 0.3}, "packages": {"datasets": "4"}}
    return dataset_card("notes", "1234", build(examples).summary, watermark=7, **inputs)


def test_the_card_describes_the_dataset():
    notes = [example(n, source="notes", provenance=f"a|b.md:{n}") for n in range(3)]
    card = card_of(*notes, example(8), example(9, reward=0.1))
    assert "# Dataset 1234 of notes" in card and "4 training examples + 0 replay, and 0 validation examples" in card
    assert "| logs | 1 | 25.0% |\n| notes | 3 | 75.0% |" in card
    assert "| min_reward | 0.3 |" in card and "| raw_logs | abc |" in card and "| watermark | 7 |" in card
    assert "| reward below 0.3 | 1 |" in card.split("## Left out")[1].split("##")[0]
    assert '"provenance": "a|b.md:' in card.split("## Sample")[1]


def test_a_secret_is_counted_and_never_shown():
    card = card_of(example(1, prompt="write to jane.doe@example.org", target="key AKIAIOSFODNN7EXAMPLE"))
    assert "jane.doe" not in card and "AKIA" not in card
    assert "| email | 1 |" in card.split("## Replaced")[1]


def test_text_of_an_example_cannot_leave_the_sample():
    card = card_of(example(1, prompt="```\n# Not a heading\n<script>", target=" ".join(map(str, range(1_000, 2_000)))))
    inside = card.split("```json\n")[1]
    assert inside.count("\n```") == 1 and inside.endswith("\n```\n")
    assert "(4,999 characters)" in inside


def test_the_sample_has_every_source():
    counts = (("a", 9), ("b", 1), ("c", 9))
    rows = [DatasetExample(f"p{n}", "a", 1.0, source) for source, count in counts for n in range(count)]
    assert [row.source for row in card_sample(rows)] == ["a", "b", "c", "a", "c"]
    many = [DatasetExample("p", "a", 1.0, f"s{n:02}") for n in range(60)] * 3
    assert [row.source for row in card_sample(many)] == [f"s{n:02}" for n in range(60)]
    assert card_sample([]) == []


def test_provenance_csv_has_every_example(tmp_path):
    notes = [example(n, source="notes", provenance=f'a, "b"|{n}.md\n') for n in range(30)]
    replay = [replay_example("old prompt", provenance="replay.jsonl:1")]
    build([*notes, example(99)], POLICY, replay, tmp_path)
    with (tmp_path / PROVENANCE_FILE).open(encoding="utf-8", newline="") as file:
        lines = [tuple(row.values()) for row in csv.DictReader(file)]
    rows = [(split, row) for split in SPLITS for row in dataset_rows(tmp_path, split)]
    expected = [(row["source"], row["provenance"] or "", row["interaction_id"] or "", split) for split, row in rows]
    assert sorted(lines) == sorted(expected) and {split for *_, split in lines} == set(SPLITS)
