"""Answers of a model to the benchmark, and its speed."""

from pydantic import Field

from finetune_pipeline.records import Record


class BenchmarkAnswer(Record):
    """One model's answer to one question of the benchmark."""

    id: str = Field(description="Id of the question.")
    text: str
    confidence: float | None = Field(default=None, ge=0, le=1, description="Lowest probability among value tokens.")
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)


class Speed(Record):
    """Speed of one model, measured one prompt at a time."""

    latency_p50_ms: float = Field(ge=0, description="Median latency of an answer in milliseconds.")
    latency_p95_ms: float = Field(ge=0, description="95th percentile of the latency in milliseconds.")
    tokens_per_second: float = Field(ge=0, description="Generated tokens divided by generation time.")
    prompts: int = Field(ge=1, description="Number of timed answers.")
    threads: int | None = Field(default=None, description="Number of threads for decoding, fixed while timing.")
    contention: str | None = Field(
        default=None,
        description="CPU time used by other processes while timing; if set, this is not the model's own speed.",
    )
