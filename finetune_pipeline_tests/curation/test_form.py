"""CODE_VERSION has to be raised when curation changes, since cached results and datasets of the old code are reused."""

import hashlib

from finetune_pipeline.curation import filter
from finetune_pipeline.settings import PROJECT_ROOT

FILES = (
    *(f"curation/{name}.py" for name in ("acceptance", "dataset", "decontamination", "deduplication", "filter",
                                         "found_values", "personal_data", "redaction", "secret_patterns", "select")),
    "refusals.py",
    "words.py",
)  # fmt: skip
LAST = (22, "c4594a7e30a74e7e")


def test_changed_curation_has_another_code_version():
    text = b"".join((PROJECT_ROOT / "finetune_pipeline" / name).read_bytes() for name in FILES)
    now = (filter.CODE_VERSION, hashlib.sha256(text).hexdigest()[:16])
    assert now == LAST, (
        f"found {now}, expected {LAST}: raise CODE_VERSION in curation/filter.py if any row may be filtered, redacted "
        "or selected differently than before, then set LAST to what was found here"
    )
