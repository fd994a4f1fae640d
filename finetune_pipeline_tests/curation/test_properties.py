"""Properties of every dataset and of every file of it, tested on many random logs."""

import json
import tempfile
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_pipeline.curation.acceptance import CONFLICT, Policy
from finetune_pipeline.curation.dataset import in_validation
from finetune_pipeline.curation.dataset_card import dataset_card
from finetune_pipeline.curation.dataset_checks import inspect_dataset
from finetune_pipeline.curation.dataset_files import (
    DATASET_CARD,
    PREFERENCE,
    PROMPT_COMPLETION,
    UNPAIRED_PREFERENCE,
    read_all,
)
from finetune_pipeline.curation.decontamination import NGRAM, NearIndex
from finetune_pipeline.curation.select import DUPLICATE, NEAR_DUPLICATE
from finetune_pipeline.records import Example, normalize
from finetune_pipeline.schemas import answer_validator
from finetune_pipeline.settings import CurationSettings
from finetune_pipeline_tests.conftest import START, uid

from .datasets import IN_MEMORY, build, replay_example, turns

QUESTIONS = {
    "long": "How thick does a concrete wall beside the stair have to be for two hours of fire rating?",
    "other": "Which glazing would you choose for a window that faces the sea in a parish with strong wind?",
    "short": "Timber roof; T24; CA; R47!",  # five words
    "shorter": "Revise WD leaf, 850x2600",  # four
}
POLICY = Policy(CurationSettings(validation_fraction=0.4), NearIndex(QUESTIONS), answer_validator(None))
SECRETS = (
    "ann.smith@example.com", "+49 30 901820", "4111 1111 1111 1111", "hf_" + "aB1" * 12, "AKIA" + "IOSFODNN7EXAMPLE",
    "postgresql://bob:hunter2@db.example.com/x",
)  # fmt: skip
LEAKED = ("ann.smith", "30 901820", "4111 1111", "aB1aB1", "IOSFODNN7", "hunter2")

WORDS = (
    "wall", "door", "window", "of", "with", "a", "150", "180", "mm", "steel", "brick", "two", "hours", "Straße", "壁",
    "please", "now",
)  # fmt: skip
ASKED = (
    "Make the brick wall of the large hall on the second floor 180 mm thicker",
    "Put a steel door with a closer between the Straße and the 壁 of the kitchen",
)
EDITS = (
    str, str, str, str.upper, "please {}".format, "{}!".format, lambda text: text.replace(" ", "  \n"),
    lambda text: text[:20] + "q" + text[21:],
)  # fmt: skip
"""What leaves a prompt the same, or nearly."""

texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=14).map(" ".join)
asked = st.builds(lambda text, edit: edit(text), st.sampled_from(ASKED), st.sampled_from(EDITS))
planted = st.tuples(asked, st.sampled_from([*SECRETS, *[""] * 12])).map(" ".join)
answers = st.sampled_from(["yes"] * 8 + ["no"] * 4 + ['{"a": 1}', '{ "a":1 }', "mail ann.smith@example.com", " "])
histories = st.sampled_from([()] * 7 + [turns("about a house, ask ann.smith@example.com", "Which?")])


@st.composite
def logs(draw, prompts=planted):
    """Examples, each with its own id, some of them the same but for it."""
    rewards, provenances = (
        st.sampled_from([0.9, 0.9, 0.9, 0.5, 0.2, -0.8]),
        st.none() | planted.map("Notes/a.md#{}".format),
    )
    fields = st.tuples(prompts, histories, answers, answers, rewards, st.booleans(), st.booleans(), provenances)
    made = []
    for number, (prompt, history, target, output, reward, confirmed, corrected, provenance) in enumerate(
        draw(st.lists(fields, min_size=8, max_size=16))
    ):
        given = {"prompt": prompt, "history": history, "target": target, "output": output if corrected else target}
        flags = {"confidence": 0.9, "confirmed": confirmed, "corrected": corrected, "ingest_offset": number}
        flags["created_at"] = START + timedelta(minutes=number // 4)
        flags |= {"reward": reward, "provenance": provenance}
        made.append(Example(interaction_id=uid(str(number)), **given, **flags))
    return made


@st.composite
def leaks(draw):
    """A benchmark's question: as it is, within other words, and of a long one with another letter or a part of it."""
    question = draw(st.sampled_from(list(QUESTIONS.values())))
    ways = [question, f"{draw(texts)} {question} {draw(texts)}"]
    words = question.split()
    if len(words) > NGRAM:
        place = draw(st.integers(0, len(question) - 1))
        start = draw(st.integers(0, len(words) - NGRAM))
        end = draw(st.integers(start + NGRAM, len(words)))
        ways += [question[:place] + "q" + question[place + 1 :], " ".join(words[start:end])]
    return draw(st.sampled_from([str, str.lower, str.upper, str.title]))(draw(st.sampled_from(ways)))


def files_of(examples, replay):
    """Return the text of all files of the dataset of these examples, with its card."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
        folder = Path(name) / "dataset"
        built = build(examples, POLICY, replay, folder, "Answer.", identity=lambda example: "a hash")
        content = {"watermark": 1, "inputs": {}, "settings": {}, "packages": {}}
        (folder / DATASET_CARD).write_text(dataset_card("notes", "v", built.summary, **content))
        rows = list(read_all(folder))
        assert inspect_dataset(folder, POLICY).near_benchmark == ()
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert {path.parts[-3] for path in files if path.suffix == ".arrow"} == {
            PROMPT_COMPLETION,
            PREFERENCE,
            UNPAIRED_PREFERENCE,
        }
        plain = [path.read_text() for path in files if path.suffix != ".arrow"]
    return built, "\n".join([*plain, *(json.dumps(row, ensure_ascii=False, default=str) for row in rows)])


def test_the_random_logs_need_every_step_of_selection():
    often = Counter()

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(logs())
    def look(examples):
        summary = build(examples, POLICY).summary
        pairs = any(summary.rows[PREFERENCE].values())
        often.update(summary.left_out.keys(), redacted=bool(summary.redacted), pairs=pairs)

    look()
    assert min(often[name] for name in (DUPLICATE, NEAR_DUPLICATE, CONFLICT, "redacted", "pairs")) >= 20, often


@settings(max_examples=60, deadline=None)
@given(logs(), st.randoms(use_true_random=False))
def test_the_order_does_not_matter(examples, rng):
    shuffled = rng.sample(examples, len(examples))
    assert build(shuffled, POLICY) == build(examples, POLICY)


@settings(max_examples=60, deadline=None)
@given(logs())
def test_curating_a_dataset_again_changes_nothing(examples):
    once = build(examples, POLICY)
    by_id = {str(example.interaction_id): example for example in examples}
    kept = [
        by_id[row.interaction_id].model_copy(
            update={
                "prompt": row.prompt,
                "history": row.history,
                "target": row.completion,
                "output": row.completion,
                "provenance": row.provenance,
            }
        )
        for row in once.examples
    ]
    again = build(kept, POLICY)
    assert [replace(row, content_hash=None) for row in again.examples] == [
        replace(row, content_hash=None) for row in once.examples
    ]
    assert again.summary.left_out == {} and again.summary.redacted == {}


@settings(max_examples=60, deadline=None)
@given(logs(), logs())
def test_a_prompt_never_changes_its_split(early, late):
    late = [example.model_copy(update={"interaction_id": uid(f"late {n}")}) for n, example in enumerate(late)]
    first, second = (build(given, POLICY) for given in (early, [*early, *late]))
    for one, other in ((first.train, second.validation), (first.validation, second.train)):
        assert not {normalize(row.conversation) for row in one} & {normalize(row.conversation) for row in other}
    assert all(in_validation(row.conversation, 0.4) for row in second.validation)


@settings(max_examples=60, deadline=None)
@given(logs(texts), st.lists(texts, max_size=30))
def test_replay_never_validates(examples, replayed):
    replay = [replay_example(prompt, "yes", f"replay.jsonl:{n}") for n, prompt in enumerate(replayed, start=1)]
    everything = replace(POLICY, settings=POLICY.settings.model_copy(update={"replay_ratio": 10.0}))
    first = build(examples, everything, replay)
    later = [
        Example(
            interaction_id=uid(f"later {n}"), ingest_offset=99, created_at=START,
            prompt=row.prompt, output="no", target="no", reward=0.9,
            confirmed=True, corrected=False,
        )
        for n, row in enumerate(first.replay)
    ]  # fmt: skip
    second = build([*examples, *later], everything, replay)
    trained = {normalize(row.conversation) for row in first.train}
    assert not trained & {normalize(row.conversation) for row in second.validation}
    wanted = round(10 * first.summary.rows[PROMPT_COMPLETION]["train"])
    free = {row.prompt for row in replay if not in_validation(row.prompt, 0.4)} - {row.prompt for row in first.train}
    assert first.summary.replayed == wanted or not free  # and no more is held back than has to be


@settings(max_examples=60, deadline=None)
@given(logs())
def test_no_planted_secret_reaches_a_file(examples):
    replay = [replay_example(f"old {n} {secret}", f"old {secret}") for n, secret in enumerate(SECRETS)]
    _, text = files_of(examples, replay)
    assert not [secret for secret in LEAKED if secret in text]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(leaks(), st.sampled_from(["good", "corrected", "bad"]), st.booleans()), min_size=1, max_size=8),
    logs(),
)
def test_no_planted_overlap_with_the_benchmark_reaches_a_file(planted_leaks, others):
    made = []
    for n, (leak, kind, earlier) in enumerate(planted_leaks):
        asked = {"prompt": "and then?", "history": turns(leak, "yes")} if earlier else {"prompt": leak}
        found = {
            "reward": -0.9 if kind == "bad" else 0.9,
            "confirmed": kind == "good",
            "corrected": kind == "corrected",
        }
        output = "no" if kind == "corrected" else "yes"
        made.append(
            Example(
                interaction_id=uid(f"leak {n}"),
                ingest_offset=n,
                created_at=START,
                target="yes",
                output=output,
                **asked,
                **found,
            )
        )
    replay = [replay_example(leak, "yes") for leak, _, _ in planted_leaks]
    built, text = files_of([*others, *made], replay)
    ids = {str(example.interaction_id) for example in made}
    assert ids <= set(built.summary.near_benchmark)
    assert not [one for one in ids if one in text]
    assert not [leak for leak, _, _ in planted_leaks if normalize(leak) in normalize(text)]
