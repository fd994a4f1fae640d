"""How many examples each source may give."""

from hypothesis import given
from hypothesis import strategies as st

from finetune_pipeline.curation.quotas import Quota, allowed

COUNTS = st.dictionaries(st.sampled_from("abcde"), st.integers(0, 500), max_size=5)
QUOTAS = st.dictionaries(
    st.sampled_from("abcde"),
    st.builds(Quota, st.none() | st.integers(1, 300), st.floats(0.05, 1)),
)


def test_without_quotas_all_may_come():
    assert allowed({"logs": 10, "notes": 90}, {}) == {"logs": 10, "notes": 90}


def test_a_share_is_of_what_is_left():
    assert allowed({"logs": 80, "notes": 900}, {"notes": Quota(share=0.2)}) == {"logs": 80, "notes": 20}


def test_a_number_is_a_number():
    assert allowed({"logs": 80, "notes": 900}, {"notes": Quota(examples=50)}) == {"logs": 80, "notes": 50}


def test_a_source_that_is_alone_drowns_nobody():
    assert allowed({"logs": 0, "notes": 900}, {"notes": Quota(share=0.2)}) == {"logs": 0, "notes": 900}


def test_shares_below_one_stand_for_their_proportions():
    assert allowed({"notes": 900, "code": 900}, {"notes": Quota(share=0.1), "code": Quota(share=0.3)}) == {
        "notes": 300,
        "code": 900,
    }


@given(COUNTS, QUOTAS)
def test_no_source_gives_more_than_its_share_of_the_whole(counts, quotas):
    may = allowed(counts, quotas)
    total = sum(may.values())
    shares = [quotas.get(source, Quota()).share for source, count in may.items() if counts[source]]
    scale = max(1.0, 1 / sum(shares)) if shares else 1.0
    for source, count in may.items():
        quota = quotas.get(source, Quota())
        assert 0 <= count <= counts[source]
        assert quota.examples is None or count <= quota.examples
        assert count <= total * min(1.0, quota.share * scale) + 1e-6
    if any(counts.values()):
        assert total > 0 or any(quota.share < 0.5 for quota in quotas.values())
