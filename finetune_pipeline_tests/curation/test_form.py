"""What was found of older logs is used again, so nobody may change how it is found and leave its number as it is."""

import hashlib

from finetune_pipeline.curation import sifting
from finetune_pipeline.settings import PROJECT_ROOT

FINDS = (
    "acceptance", "choosing", "chosen", "decontamination", "meaning", "near_duplicates", "preferences", "quality",
    "redaction", "sifting", "token_count",
)  # fmt: skip
LAST = (8, "ac8cb41b25e0fe08")


def test_what_finds_otherwise_has_another_number():
    text = b"".join((PROJECT_ROOT / f"finetune_pipeline/curation/{name}.py").read_bytes() for name in FINDS)
    now = (sifting.FORM, hashlib.sha256(text).hexdigest()[:16])
    assert now == LAST, (
        f"found {now}, expected {LAST}: raise sifting.FORM if any row may be judged, redacted or chosen otherwise than "
        "before (or what was found of older logs, and datasets of it, stay as they are), then write what was found here"
    )
