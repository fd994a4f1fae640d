"""What a model said in answer to the benchmark, and how fast it was."""

from pydantic import Field

from finetune_pipeline.records import Record


class Answer(Record):
    """One answer of one model."""

    id: str = Field(description="Id of the question.")
    text: str
    confidence: float | None = Field(default=None, ge=0, le=1, description="Lowest probability among value tokens.")
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)


class Speed(Record):
    """How fast one model answers, one prompt at a time."""

    latency_p50_ms: float = Field(ge=0, description="Half of the answers took at most so long, milliseconds.")
    latency_p95_ms: float = Field(ge=0, description="95 % of the answers took at most so long, milliseconds.")
    tokens_per_second: float = Field(ge=0, description="Generated tokens by the time spent generating them.")
    prompts: int = Field(ge=1, description="How many answers were timed.")
    threads: int | None = Field(
        default=None, description="Number of threads that decoded, constant over the measurement."
    )
    disturbed: str | None = Field(
        default=None,
        description="Other work on the cores during the measurement; if set, this is not the model's own speed.",
    )
