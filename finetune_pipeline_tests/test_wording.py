"""Words that do not come back: private terms of earlier versions, and British spelling beside American.

The vocabulary is in docs/reference/glossary.md and CONTRIBUTING.md. The test reads code, comments, docstrings, help
texts, log lines, error messages and docs.
"""

import re
import subprocess

import pytest

from finetune_pipeline.settings import PROJECT_ROOT

SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".html", ""}
# Migrations name the tables of their time; these test notes are other people's text by design; data is not prose.
SKIPPED = (
    "finetune_pipeline/database/migrations/versions/",
    "finetune_pipeline_tests/sources/vault/",
    "finetune_pipeline_tests/test_wording.py",
    "finetune_pipeline_tests/database/test_database.py",  # inserts into the tables of earlier versions
    "data/",
    "LICENSE",
)
WORDS = {
    r"fore(tell|told)\w*": "predict, predicted",
    r"deals? out|dealing out|dealt": "split across ranks, shard",
    r"shared rows?": "packed sequence",
    r"unbroken": "uninterrupted",
    r"right against|parameters right": "correct",
    r"falling slices?": "regressed slices",
    r"reckon\w*": "estimate, count",
    r"besides": "in addition, also",
    r"anew": "again",
    r"mend(s|ed|ing)?": "fix",
    r"tellers?": "callback",
    r"sift(s|ed|ing)?": "filter",
    r"found (good|bad)": "desirable, undesirable",
    r"tak(e|es|en|ing) over|took over": "fallback, recovered",
    r"go(es)? on from|went on from|going on from": "resume from, warm-started from",
    r"put(s|ting)? aside": "dead-letter, quarantine",
    r"tall(y|ies|ied)": "counter",
    r"person's eye": "human review",
    r"labelled": "labeled",
    r"quantis\w+": "quantize",
    r"normalis\w+": "normalize",
    r"tokenis\w+": "tokenize",
    r"serialis\w+": "serialize",
    r"initialis\w+": "initialize",
    r"materialis\w+": "materialize",
    r"recognis\w+": "recognize",
    r"optimis(e|ed|er|ers|es|ing|ation)": "optimize",
    r"behaviours?": "behavior",
    r"colours?": "color",
}
PATTERN = re.compile(
    "|".join(
        f"(?P<w{number}>(?<![A-Za-z])(?:{word.replace(' ', '[_ ]')})(?![A-Za-z]))" for number, word in enumerate(WORDS)
    ),
    re.IGNORECASE,
)
"""Matches in identifiers too: how_it_was_reckoned."""


def prose_files():
    listed = subprocess.run(["git", "ls-files"], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True).stdout
    paths = [PROJECT_ROOT / name for name in listed.splitlines() if not name.startswith(SKIPPED)]
    return [path for path in paths if path.suffix in SUFFIXES and path.is_file()]


@pytest.mark.parametrize("path", prose_files(), ids=lambda path: str(path.relative_to(PROJECT_ROOT)))
def test_no_private_words(path):
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        for match in PATTERN.finditer(line):
            word = list(WORDS)[int(str(match.lastgroup)[1:])]
            found.append(f"{path.name}:{number}: {match.group()!r}; write {WORDS[word]}")
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "a row was Foretold",
        "found good by",
        "quantised",
        "It is put aside.",
        "taken over",
        "how_it_was_reckoned",
        "taken_over",
    ],
)
def test_the_words_are_found(text):
    assert PATTERN.search(text)


@pytest.mark.parametrize("text", ["recommend", "amendment", "storyteller's", "besieged", "overtake", "optimistic"])
def test_parts_of_other_words_are_not(text):
    assert not PATTERN.search(text)
