"""Quotas: how many examples each source gives to a dataset."""

from hypothesis import given
from hypothesis import strategies as st

from finetune_pipeline.curation.acceptance import Quota
from finetune_pipeline.curation.select import apply_quotas

COUNTS = st.dictionaries(st.sampled_from("abcde"), st.integers(0, 500), max_size=5)
QUOTAS = st.dictionaries(
    st.sampled_from("abcde"),
    st.builds(Quota, st.none() | st.integers(1, 300), st.floats(0.05, 1)),
)


def test_without_quotas_every_example_is_kept():
    assert apply_quotas({"logs": 10, "notes": 90}, {}) == {"logs": 10, "notes": 90}


def test_a_fraction_is_of_the_dataset_that_results():
    assert apply_quotas({"logs": 80, "notes": 900}, {"notes": Quota(max_fraction=0.2)}) == {"logs": 80, "notes": 20}


def test_max_examples_is_a_number():
    assert apply_quotas({"logs": 80, "notes": 900}, {"notes": Quota(max_examples=50)}) == {"logs": 80, "notes": 50}


def test_a_single_source_is_not_cut():
    assert apply_quotas({"logs": 0, "notes": 900}, {"notes": Quota(max_fraction=0.2)}) == {"logs": 0, "notes": 900}


def test_fractions_that_cannot_fill_the_dataset_act_as_proportions():
    assert apply_quotas(
        {"notes": 900, "code": 900}, {"notes": Quota(max_fraction=0.1), "code": Quota(max_fraction=0.3)}
    ) == {
        "notes": 300,
        "code": 900,
    }


def shared(counts, **fractions):
    return apply_quotas(counts, {source: Quota(max_fraction=fraction) for source, fraction in fractions.items()})


def test_a_tiny_source_does_not_empty_the_dataset():
    assert shared({"logs": 1000, "notes": 1}, logs=0.7, notes=0.3) == {"logs": 1000, "notes": 1}
    assert shared({"a": 5000, "b": 37, "c": 300}, a=0.5, b=0.3, c=0.2) == {"a": 5000, "b": 37, "c": 300}
    assert shared({"logs": 300, "vault": 200, "code": 7}, logs=0.5, vault=0.3, code=0.2) == {
        "logs": 300,
        "vault": 180,  # in proportion to the 300 as 3 to 5
        "code": 7,
    }


def test_small_numbers_are_not_rounded_away():
    assert shared({"a": 10, "b": 10}, a=0.15, b=0.22) == {"a": 6, "b": 10}
    assert shared({"a": 30, "b": 30, "c": 30}, a=0.34, b=0.33, c=0.33) == {"a": 30, "b": 29, "c": 29}
    assert shared({"logs": 3, "notes": 900}, notes=0.1) == {"logs": 3, "notes": 1}


def test_the_source_with_the_largest_fraction_leads():
    assert shared({"imported": 2000, "logs": 100}, imported=0.25, logs=0.9) == {"imported": 33, "logs": 100}


@given(COUNTS, QUOTAS)
def test_sources_keep_their_quota_and_none_is_cut_needlessly(counts, quotas):
    allowed = apply_quotas(counts, quotas)
    total, capped = sum(allowed.values()), {}
    for source, count in counts.items():
        quota = quotas.get(source, Quota())
        capped[source] = count if quota.max_examples is None else min(count, quota.max_examples)
    fractions = {source: quotas.get(source, Quota()).max_fraction for source in capped if capped[source]}
    if not fractions:
        assert allowed == capped
        return
    fraction, most = max((fractions[source], capped[source]) for source in fractions)
    cut = [source for source in fractions if allowed[source] < capped[source]]
    assert all(allowed[source] == 0 for source in capped if source not in fractions)
    assert all(1 <= allowed[source] <= capped[source] for source in fractions)
    assert (
        all(fractions[source] <= fraction for source in cut) and total >= most
    )  # the leading source keeps all its examples
    for source in cut:
        own = max(fractions[source] * total, fractions[source] / fraction * most)
        # Rounding down takes less than one example of each source.
        assert allowed[source] <= max(1, own + len(cut) * fractions[source] + 1e-6)
        assert allowed[source] + 1 > own - 1e-6 - sum(allowed[other] == 1 for other in cut) * fractions[source]


@given(COUNTS, QUOTAS, st.randoms(use_true_random=False))
def test_the_order_of_sources_does_not_matter(counts, quotas, rng):
    shuffled = dict(rng.sample(list(counts.items()), len(counts)))
    assert apply_quotas(shuffled, quotas) == apply_quotas(counts, quotas)


@given(COUNTS, QUOTAS, st.sampled_from("abcde"), st.integers(1, 500))
def test_more_of_one_source_never_means_less_of_another(counts, quotas, source, more):
    counts = {name: count for name, count in counts.items() if count}
    if source in counts:  # a new source may become the leading one
        before, after = apply_quotas(counts, quotas), apply_quotas({**counts, source: counts[source] + more}, quotas)
        assert all(after[name] >= before[name] for name in counts)
