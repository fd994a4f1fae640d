"""Which prompts become questions of a benchmark."""

from collections import Counter

import pytest

from finetune_pipeline.curation.decontamination import jaccard, shingles
from finetune_pipeline.pipeline.benchmark_split import choose_questions, count_distinct, question_count

NOUNS = ["harbor", "invoice", "printer", "garden", "password", "contract", "ladder", "window", "engine", "cheese"]


def unlike(count):
    """Return prompts of which no two are near-duplicates."""
    return [f"{NOUNS[n % 10]} {NOUNS[n // 10 % 10]} {n * 7919} {NOUNS[(n * 3 + 1) % 10]}" for n in range(count)]


@pytest.mark.parametrize(
    ("prompts", "questions"),
    [(8, 4), (60, 30), (79, 39), (80, 40), (100, 40), (160, 40), (400, 100), (2_000, 500), (13_784, 500)],
)
def test_a_quarter_at_least_40_and_never_more_than_half(prompts, questions):
    assert question_count(prompts) == questions


def test_each_slice_has_its_part_and_the_choice_is_the_same_again():
    prompts = unlike(200)
    slices = {n: "rare" if n % 20 == 0 else "common" if n % 2 else "other" for n in range(200)}
    chosen = choose_questions(prompts, slices, 0.8)
    assert Counter(slices[n] for n in chosen) == {"common": 25, "other": 23, "rare": 2} and chosen == sorted(chosen)
    assert choose_questions(prompts, slices, 0.8) == chosen
    assert choose_questions(prompts, slices, 0.8, seed=1) != chosen


def test_near_duplicates_stay_on_one_side():
    prompts = unlike(100)
    prompts += [f"{prompt}!" for prompt in prompts[:60]]
    chosen = {*choose_questions(prompts, dict.fromkeys(range(160), "all"), 0.8)}
    together = {n: n - 100 for n in range(100, 160)}
    assert len(chosen) == 40 and all((n in chosen) == (twin in chosen) for n, twin in together.items())


def test_one_large_group_still_gives_questions():
    prompts = [
        f"please book the harbor room for a team of {n} people on monday, thank you very much" for n in range(100)
    ]
    assert jaccard(shingles(prompts[1]), shingles(prompts[2])) > 0.8
    assert len(choose_questions(prompts, dict.fromkeys(range(100), "all"), 0.8)) == 40


def test_distinct_examples_are_counted_as_curation_keeps_them():
    prompts = [*unlike(30), *unlike(10), *[f"{prompt}!" for prompt in unlike(5)]]
    assert count_distinct(prompts, ["a"] * 45, 0.8) == 30
    assert count_distinct(prompts, [f"{n}" for n in range(45)], 0.8) == 45  # other answers
    assert count_distinct([], [], 0.8) == 0


def test_only_some_prompts_can_be_questions():
    prompts = unlike(50)
    slices = dict.fromkeys(range(0, 50, 2), "even")
    chosen = choose_questions(prompts, slices, 0.8)
    assert len(chosen) == 12 and {*chosen} <= slices.keys()
