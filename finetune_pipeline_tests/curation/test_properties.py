"""What holds of every curation, tried on many made-up logs."""

import json
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_pipeline.curation.dataset import Row, curate, in_validation, overlaps
from finetune_pipeline.curation.duplicates import NearIndex
from finetune_pipeline.curation.rules import Policy, answer_validator
from finetune_pipeline.records import Example, Turn, normalise
from finetune_pipeline.settings import CurationSettings
from finetune_pipeline_tests.conftest import uid

from .test_dataset import identity, rows_of

QUESTIONS = {
    "long": "How thick does a concrete wall beside the stair have to be for two hours of fire rating?",
    "other": "Which glazing would you choose for a window that faces the sea in a parish with strong wind?",
    "short": "Timber roof; T24; CA; R47!",  # five words
    "shorter": "Revise WD leaf, 850x2600",  # four
}
POLICY = Policy(CurationSettings(validation_share=0.4), NearIndex(QUESTIONS), answer_validator(None))
SECRETS = (
    "ann.smith@example.com", "+49 30 901820", "4111 1111 1111 1111", "hf_" + "aB1" * 12, "AKIA" + "IOSFODNN7EXAMPLE",
    "postgresql://bob:hunter2@db.example.com/x",
)  # fmt: skip
LEAKED = ("ann.smith", "901820", "4111 1111", "aB1aB1", "IOSFODNN7", "hunter2")

words = st.sampled_from(
    [
        "wall",
        "door",
        "window",
        "of",
        "with",
        "a",
        "150",
        "180",
        "mm",
        "steel",
        "brick",
        "two",
        "hours",
        "Straße",
        "壁",
        "please",
        "now",
    ]
)
texts = st.lists(words, min_size=1, max_size=14).map(" ".join)
planted = st.tuples(texts, st.sampled_from([*SECRETS, "", ""])).map(" ".join)
answers = st.sampled_from(["yes", "no", '{"a": 1}', '{ "a":1 }', "mail ann.smith@example.com", " "])


@st.composite
def logs(draw, prompts=planted):
    """Examples, each with an id and a sequence of its own."""
    rewards, origins = st.sampled_from([-0.8, 0.2, 0.5, 0.9]), st.none() | planted.map("Notes/a.md#{}".format)
    fields = st.tuples(prompts, answers, rewards, st.booleans(), st.booleans(), origins)
    made = []
    for number, (prompt, target, reward, confirmed, corrected, origin) in enumerate(
        draw(st.lists(fields, max_size=12))
    ):
        given = {"prompt": prompt, "target": target, "output": "no" if corrected else target, "reward": reward}
        flags = {"confidence": 0.9, "confirmed": confirmed, "corrected": corrected, "sequence": number // 2}
        flags |= {"origin": origin}
        made.append(Example(interaction_id=uid(str(number)), **given, **flags))
    return made


def written(curated):
    """Every text of a dataset."""
    rows = [
        *rows_of(curated),
        *(row for part in (curated.pairs, curated.undesirable) for s in part.values() for row in s),
    ]
    return json.dumps([list(vars(row).values()) for row in rows], default=str, ensure_ascii=False)


@settings(max_examples=60, deadline=None)
@given(logs(), st.randoms(use_true_random=False))
def test_the_order_does_not_matter(examples, rng):
    shuffled = rng.sample(examples, len(examples))
    assert curate(shuffled, [], POLICY, identity) == curate(examples, [], POLICY, identity)


@settings(max_examples=60, deadline=None)
@given(logs())
def test_what_was_curated_stays_as_it_is(examples):
    once = curate(examples, [], POLICY, identity)
    by_id = {str(example.interaction_id): example for example in examples}
    kept = [
        by_id[row.interaction_id].model_copy(
            update={"prompt": row.prompt, "target": row.completion, "output": row.completion, "origin": row.origin}
        )
        for row in rows_of(once)
    ]
    again = curate(kept, [], POLICY, identity)
    assert [replace(row, content_hash=None) for row in rows_of(again)] == [
        replace(row, content_hash=None) for row in rows_of(once)
    ]
    assert again.left_out == {} and again.redacted == {}


@settings(max_examples=60, deadline=None)
@given(logs(), logs())
def test_a_question_never_changes_sides(early, late):
    late = [example.model_copy(update={"interaction_id": uid(f"late {n}")}) for n, example in enumerate(late)]
    first, second = (curate(given, [], POLICY, identity) for given in (early, [*early, *late]))
    for one, other in ((first.train, second.validation), (first.validation, second.train)):
        assert not {normalise(row.question) for row in one} & {normalise(row.question) for row in other}
    assert all(in_validation(row.question, 0.4) for row in second.validation)


@settings(max_examples=60, deadline=None)
@given(logs(texts), st.lists(texts, max_size=30))
def test_what_was_replayed_never_validates(examples, replayed):
    replay = [Row(prompt, "yes", 1.0, "replay", f"replay.jsonl:{n}") for n, prompt in enumerate(replayed, start=1)]
    everything = replace(POLICY, settings=POLICY.settings.model_copy(update={"replay_ratio": 10.0}))
    first = curate(examples, replay, everything, identity)
    later = [
        Example(
            interaction_id=uid(f"later {n}"), sequence=99, prompt=row.prompt, output="no", target="no", reward=0.9,
            confirmed=True, corrected=False,
        )
        for n, row in enumerate(first.replay)
    ]  # fmt: skip
    second = curate([*examples, *later], replay, everything, identity)
    trained = {normalise(row.question) for row in first.train}
    assert not trained & {normalise(row.question) for row in second.validation}
    wanted = round(10 * first.count("dataset", "train"))
    free = {row.prompt for row in replay if not in_validation(row.prompt, 0.4)} - {row.prompt for row in first.train}
    assert first.replayed == wanted or not free  # and no more is held back than has to be


@settings(max_examples=60, deadline=None)
@given(logs())
def test_no_planted_secret_reaches_a_dataset(examples):
    text = written(curate(examples, [], POLICY, lambda example: "a hash"))
    assert not [secret for secret in LEAKED if secret in text]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            texts,
            st.sampled_from(list(QUESTIONS.values())),
            texts,
            st.sampled_from(["lower", "upper", "title"]),
            st.booleans(),
        )
    ),
    logs(texts),
)
def test_no_planted_overlap_with_the_benchmark_gets_through(asked, others):
    leaks = []
    for n, (before, question, after, case, earlier) in enumerate(asked):
        leak = f"{before} {getattr(question, case)()} {after}"
        said = (Turn(role="user", content=leak), Turn(role="assistant", content="yes")) if earlier else ()
        leaks.append(
            Example(
                interaction_id=uid(f"leak {n}"), sequence=n, prompt=f"and then {after}" if earlier else leak,
                history=said, output="yes", target="yes", reward=0.9, confirmed=True, corrected=False,
            )
        )  # fmt: skip
    curated = curate([*others, *leaks], [], POLICY, identity)
    ids = {str(example.interaction_id) for example in leaks}
    assert not ids & {row.interaction_id for row in rows_of(curated)}
    assert ids <= set(curated.near_benchmark)
    assert overlaps([vars(row) for row in rows_of(curated)], POLICY) == []
