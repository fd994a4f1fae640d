"""The tables. A change here needs a migration in `migrations/versions/`; a test compares the two.

Interactions and feedback are append-only. `examples` and `loop_counters` are derived from them, and updated by the same
transaction that adds an event, so that counting new examples does not read the whole history.
"""

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

Timestamp = sa.DateTime(timezone=True)

counters = sa.Table(
    "counters",
    metadata,
    sa.Column("name", sa.String(60), primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
    comment="events: the newest ingest offset, locked until commit, so commits are in its order. "
    "store: a random number that identifies the database.",
)

interactions = sa.Table(
    "interactions",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("loop", sa.String(60), nullable=False),
    sa.Column("ingest_offset", sa.BigInteger, nullable=False, unique=True),
    sa.Column("created_at", Timestamp, nullable=False),
    sa.Column("prompt", sa.Text, nullable=False),
    sa.Column("history", sa.JSON(none_as_null=True), comment="Messages before the prompt; null if there are none."),
    sa.Column("output", sa.Text, nullable=False),
    sa.Column("model", sa.String(200)),
    sa.Column("confidence", sa.Float),
    sa.Column("validation_score", sa.Float),
    sa.Column("user", sa.String(200)),
    sa.Column("domain", sa.String(200)),
    sa.Column("kind", sa.String(200)),
    sa.Column("retrieved_context", sa.Text),
    sa.Column("variant", sa.String(200), comment="Traffic variant."),
    sa.Column("flag", sa.String(200), comment="Reason why a person should review the answer."),
    sa.Column("latency_ms", sa.Float),
    sa.Column("prompt_tokens", sa.Integer),
    sa.Column("completion_tokens", sa.Integer),
    sa.Column("seed", sa.BigInteger, comment="Sampling seed; null at temperature 0, or if unknown."),
    sa.Column("metadata", sa.JSON(none_as_null=True), comment="Further facts of the application; never trained on."),
    sa.Column("source", sa.String(200), comment="Declared source; null if an application logged it."),
    sa.Column("provenance", sa.String(1000), comment="Where in the source: note, file and line, or row key."),
    sa.Column(
        "retracted_offset",
        sa.BigInteger,
        comment="Ingest offset at which it was retracted, because its source no longer has it; null if active.",
    ),
    sa.Index(None, "loop", "ingest_offset"),
    sa.Index(None, "loop", "source", "provenance"),
    sa.Index(None, "loop", "retracted_offset"),
    sa.Index(None, "loop", "created_at"),
)

feedback = sa.Table(
    "feedback",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("loop", sa.String(60), nullable=False),
    sa.Column("ingest_offset", sa.BigInteger, nullable=False, unique=True),
    # No foreign key: feedback may arrive before its interaction.
    sa.Column("interaction_id", sa.String(36), nullable=False, index=True),
    sa.Column("created_at", Timestamp, nullable=False),
    sa.Column("kind", sa.String(30), nullable=False),
    sa.Column("score", sa.Float),
    sa.Column("rating", sa.String(10)),
    sa.Column("reward", sa.Float),
    sa.Column("correction", sa.Text),
    sa.Column("output_hash", sa.String(64)),
    sa.Column("user", sa.String(200)),
    sa.Column("metadata", sa.JSON(none_as_null=True), comment="Further facts of the application; never trained on."),
    sa.Index(None, "loop", "ingest_offset"),
)

# An empty content hash marks an example that has to be recomputed (`feedback.store.recompute_marked`).
examples = sa.Table(
    "examples",
    metadata,
    sa.Column("interaction_id", sa.String(36), primary_key=True),
    sa.Column("loop", sa.String(60), nullable=False),
    sa.Column("ingest_offset", sa.BigInteger, nullable=False),
    sa.Column("content_hash", sa.String(64), nullable=False, comment="Of the normalized prompt and the target."),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("reward", sa.Float, nullable=False),
    sa.Column("confidence", sa.Float),
    sa.Column("confirmed", sa.Boolean, nullable=False),
    sa.Column("corrected", sa.Boolean, nullable=False),
    sa.Column("review", sa.String(20), comment="approve, edit or reject; null without a decision."),
    sa.Column(
        "implicit",
        sa.Boolean,
        nullable=False,
        server_default=sa.false(),
        comment="It exists only because nobody objected to the answer in time.",
    ),
    sa.Index(None, "loop", "ingest_offset"),
    sa.Index(None, "loop", "content_hash"),
)

implicit_acceptance = sa.Table(
    "implicit_acceptance",
    metadata,
    sa.Column("loop", sa.String(60), primary_key=True),
    sa.Column("after_hours", sa.Float, nullable=False),
    sa.Column("min_confidence", sa.Float, nullable=False),
    sa.Column("reward", sa.Float, nullable=False),
    sa.Column("accepted_until", Timestamp, nullable=False, comment="Answers up to this time were looked at."),
    comment="The settings by which the implicit examples of a loop were made, and how far; no row where it is off.",
)

loop_counters = sa.Table(
    "loop_counters",
    metadata,
    sa.Column("loop", sa.String(60), primary_key=True),
    sa.Column("name", sa.String(60), primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
    comment="Numbers of rows by kind, updated by the transactions that add them, because counting them is slow.",
)

erased_events = sa.Table(
    "erased_events",
    metadata,
    # Also hashes of the names of erased persons, whose records are left out of declared sources.
    sa.Column(
        "id",
        sa.String(36),
        primary_key=True,
        comment="Of an interaction or a feedback; contains no information about the event.",
    ),
    sa.Column("loop", sa.String(60), nullable=False),
    sa.Column("ingest_offset", sa.BigInteger, nullable=False, comment="Snapshots up to here may still contain it."),
    sa.Index(None, "loop", "ingest_offset"),
    comment="Ids of erased events, which are not recorded again even if a log still contains them.",
)

review_decisions = sa.Table(
    "review_decisions",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("loop", sa.String(60), nullable=False),
    sa.Column("ingest_offset", sa.BigInteger, nullable=False, unique=True),
    sa.Column("interaction_id", sa.String(36), nullable=False, index=True),
    sa.Column("decision", sa.String(20), nullable=False, comment="approve, reject or edit."),
    sa.Column("target", sa.Text, comment="The approved or edited answer."),
    sa.Column("reviewer", sa.String(200), nullable=False),
    sa.Column("created_at", Timestamp, nullable=False),
    sa.Column("content_hash", sa.String(64), comment="Of the prompt and answer that were shown; null for an undo."),
    sa.Index(None, "loop", "ingest_offset"),
    sa.Index(None, "loop", "content_hash"),
)
# Append-only: the newest row of an interaction is its decision, unless it is an undo.

judged_examples = sa.Table(
    "judged_examples",
    metadata,
    sa.Column("loop", sa.String(60), primary_key=True),
    sa.Column("content_hash", sa.String(64), primary_key=True),
    comment="Contents of every dataset that was evaluated; they never count as new again.",
)

ingested_files = sa.Table(
    "ingested_files",
    metadata,
    sa.Column("loop", sa.String(60), primary_key=True),
    sa.Column("path", sa.String(1000), primary_key=True),
    sa.Column(
        "inode", sa.BigInteger, comment="inode, size, mtime_ns, ctime_ns: from stat, before the file was last read."
    ),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("mtime_ns", sa.BigInteger, nullable=False),
    sa.Column("ctime_ns", sa.BigInteger),
    sa.Column("offset", sa.BigInteger, nullable=False, comment="Bytes read so far."),
    sa.Column("lines", sa.Integer, nullable=False),
    sa.Column("rejected", sa.Integer, nullable=False),
    sa.Column("prefix_hash", sa.String(64), nullable=False, comment="SHA-256 of the bytes before the offset."),
    sa.Column("finished", sa.Boolean, nullable=False),
)

rejected_lines = sa.Table(
    "rejected_lines",
    metadata,
    sa.Column("loop", sa.String(60), primary_key=True),
    sa.Column("path", sa.String(1000), primary_key=True),
    sa.Column("line", sa.Integer, primary_key=True),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("excerpt", sa.Text, nullable=False),
)

source_cursors = sa.Table(
    "source_cursors",
    metadata,
    sa.Column("loop", sa.String(60), primary_key=True),
    sa.Column("source", sa.String(200), primary_key=True),
    sa.Column("cursor", sa.JSON, nullable=False, comment="Where the next sync continues, in the source's own terms."),
    sa.Column("read_at", Timestamp, nullable=False),
    comment="How far each declared source was read.",
)

skipped_records = sa.Table(
    "skipped_records",
    metadata,
    sa.Column("loop", sa.String(60), primary_key=True),
    sa.Column("source", sa.String(200), primary_key=True),
    sa.Column("provenance", sa.String(1000), primary_key=True),
    sa.Column("reason", sa.Text, nullable=False),
    comment="Records that the last sync of each source skipped, and why.",
)

published_artifacts = sa.Table(
    "published_artifacts",
    metadata,
    sa.Column("loop", sa.String(60), primary_key=True),
    sa.Column("stage", sa.String(60), primary_key=True),
    sa.Column("version", sa.String(64), primary_key=True),
    sa.Column(
        "sha256", sa.String(64), primary_key=True, comment="Of its manifest, which contains the hashes of its files."
    ),
    sa.Column("created_at", Timestamp, nullable=False),
    comment="Every published artifact; a folder that is not listed was edited, or not written by a run.",
)

check_outcomes = sa.Table(
    "check_outcomes",
    metadata,
    sa.Column("loop", sa.String(60), primary_key=True),
    sa.Column("stage", sa.String(60), primary_key=True),
    sa.Column("version", sa.String(64), primary_key=True),
    sa.Column(
        "sha256", sa.String(64), primary_key=True, comment="Of the artifact's manifest, as in published_artifacts."
    ),
    sa.Column("name", sa.String(60), primary_key=True, comment="Of a blocking check."),
    sa.Column("passed", sa.Boolean, nullable=False),
    sa.Column("run_id", sa.String(64), nullable=False),
    sa.Column("created_at", Timestamp, nullable=False),
    comment="Latest outcomes of the blocking checks; a promotion requires that all passed.",
)

model_versions = sa.Table(
    "model_versions",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True, comment="First 16 hex digits of the GGUF's SHA-256."),
    sa.Column("loop", sa.String(60), primary_key=True),
    sa.Column("major", sa.Integer, nullable=False),
    sa.Column("minor", sa.Integer, nullable=False),
    sa.Column("patch", sa.Integer, nullable=False),
    sa.Column("gguf_path", sa.Text, nullable=False),
    sa.Column("gguf_sha256", sa.String(64), nullable=False),
    sa.Column(
        "adapter_path",
        sa.Text,
        comment="LoRA adapter as GGUF, applied to gguf_path; null if gguf_path is the merged model.",
    ),
    sa.Column("adapter_sha256", sa.String(64)),
    sa.Column("base_hash", sa.String(64), nullable=False),
    sa.Column("mode", sa.String(20), nullable=False),
    sa.Column(
        "lineage", sa.JSON, nullable=False, comment="Versions of the artifacts it was made from, and the watermark."
    ),
    sa.Column("scores", sa.JSON, nullable=False),
    sa.Column("accuracy", sa.Float, comment="Quality: fraction of correct parameters, words or answers."),
    sa.Column("latency_ms", sa.Float, comment="Performance: median time of an answer."),
    sa.Column("tokens_per_second", sa.Float),
    sa.Column("size_bytes", sa.BigInteger),
    sa.Column("deployed_at", Timestamp, comment="Deployment: when it last became champion."),
    sa.Column("retired_at", Timestamp, comment="When it last ceased to be champion; null while it is champion."),
    sa.Column("deleted_at", Timestamp, comment="When its files were deleted."),
    sa.Column("archived_at", Timestamp, comment="When it was hidden from lists; null if it is shown."),
    sa.Column("report_path", sa.Text, nullable=False),
    sa.Column("created_at", Timestamp, nullable=False),
    sa.UniqueConstraint("loop", "major", "minor", "patch"),
)

champions = sa.Table(
    "champions",
    metadata,
    sa.Column("loop", sa.String(60), primary_key=True),
    sa.Column("model_id", sa.String(64), comment="Null if the base model serves."),
    sa.Column("updated_at", Timestamp, nullable=False),
)

deployment_history = sa.Table(
    "deployment_history",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("loop", sa.String(60), nullable=False),
    sa.Column(
        "action",
        sa.String(20),
        nullable=False,
        comment="promote, approve, force, switch, rollback; reject, archive, unarchive do not change the champion.",
    ),
    sa.Column("model_id", sa.String(64)),
    sa.Column("previous_id", sa.String(64)),
    sa.Column("actor", sa.String(200), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("comparison_id", sa.String(64)),
    sa.Column("created_at", Timestamp, nullable=False),
    sa.Column(
        "config",
        sa.JSON(none_as_null=True),
        comment="deployment_config: settings of the servers; null if there were none.",
    ),
    sa.Column(
        "requested_config",
        sa.JSON(none_as_null=True),
        comment="The part of config that came with the request, over the loop's YAML; null if there was none.",
    ),
    sa.Index(None, "loop", "id"),
)

comparisons = sa.Table(
    "comparisons",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True, comment="Version of the evaluation report."),
    sa.Column("loop", sa.String(60), primary_key=True),
    sa.Column("challenger_sha256", sa.String(64), nullable=False),
    sa.Column("champion_id", sa.String(64)),
    sa.Column("champion_sha256", sa.String(64), nullable=False),
    sa.Column("benchmark_sha256", sa.String(64), nullable=False),
    sa.Column("decision", sa.String(20), nullable=False, comment="promote, reject or inconclusive."),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("watermark", sa.BigInteger, nullable=False, comment="Newest ingest offset of the evaluated data."),
    sa.Column("report_path", sa.Text, nullable=False),
    sa.Column("created_at", Timestamp, nullable=False),
    sa.Column("report_sha256", sa.String(64), comment="Of the report's manifest; null if there is no report."),
    sa.Column(
        "after_deployment", sa.Integer, comment="Id of the loop's newest deployment at that time; 0 if there was none."
    ),
    sa.Column("wins", sa.Integer, comment="Questions in which the challenger's score is higher; null before 0014."),
    sa.Column("losses", sa.Integer, comment="Questions in which it is lower."),
    sa.Column("ties", sa.Integer, comment="Questions in which it is equal."),
    sa.Index(None, "loop", "watermark"),
)

approvals = sa.Table(
    "approvals",
    metadata,
    sa.Column("loop", sa.String(60), primary_key=True),
    sa.Column("comparison_id", sa.String(64), primary_key=True),
    sa.Column("challenger_sha256", sa.String(64), nullable=False),
    sa.Column("gguf_version", sa.String(64), nullable=False, comment="Version of gguf_model, whose files are kept."),
    sa.Column(
        "hashes",
        sa.JSON,
        nullable=False,
        comment="What the approval is for: dataset, adapter, gguf, report, settings, benchmark -> hash.",
    ),
    sa.Column("state", sa.String(20), nullable=False, comment="waiting, approved, rejected or void."),
    sa.Column("actor", sa.String(200), comment="Who approved or rejected; null otherwise."),
    sa.Column("reason", sa.Text, nullable=False, comment="Of the approval or rejection, or why it is void."),
    sa.Column("requested_at", Timestamp, nullable=False),
    sa.Column("expires_at", Timestamp, comment="Null: never."),
    sa.Column("decided_at", Timestamp),
    comment="Challengers that wait, or waited, for the approval of a person (approval: required).",
)

manual_comparisons = sa.Table(
    "manual_comparisons",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True, comment="Version of the report."),
    sa.Column("loop", sa.String(60), primary_key=True),
    sa.Column("first", sa.Text, nullable=False, comment="Name of a version, path of a GGUF, or URL and model."),
    sa.Column("first_sha256", sa.String(64), nullable=False, comment="Of the files, or of an endpoint's URL and time."),
    sa.Column("second", sa.Text, nullable=False, comment="Wins are its."),
    sa.Column("second_sha256", sa.String(64), nullable=False),
    sa.Column("benchmark_sha256", sa.String(64), nullable=False),
    sa.Column("wins", sa.Integer, nullable=False),
    sa.Column("losses", sa.Integer, nullable=False),
    sa.Column("ties", sa.Integer, nullable=False),
    sa.Column("p_value", sa.Float, nullable=False),
    sa.Column("report_path", sa.Text, nullable=False),
    sa.Column("created_at", Timestamp, nullable=False),
    comment="Made by `finetune compare`. They judge no data and promote nothing.",
)

requested_comparisons = sa.Table(
    "requested_comparisons",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True, comment="cmp- and 24 hexadecimal digits."),
    sa.Column("loop", sa.String(60), nullable=False),
    sa.Column("base", sa.String(200), nullable=False, comment="Name of the model to compare with."),
    sa.Column("base_id", sa.String(64), comment="Its id in the registry; null is the base model."),
    sa.Column("tuned", sa.String(200), nullable=False, comment="Name of the model to compare."),
    sa.Column("tuned_id", sa.String(64)),
    sa.Column("prompts", sa.JSON(none_as_null=True), comment="Given prompts; null: the loop's benchmark."),
    sa.Column("created_by", sa.String(200), nullable=False, comment="The API key's name, or the OS user."),
    sa.Column(
        "idempotency_key", sa.String(200), comment="Chosen by the client; one comparison for each key of a loop."
    ),
    sa.Column("request_sha256", sa.String(64), comment="Of the request with that key."),
    sa.Column("status", sa.String(20), nullable=False, comment="pending, running, completed, failed or canceled."),
    sa.Column("tries", sa.Integer, nullable=False, comment="Processes that began to work on it."),
    sa.Column("progress", sa.JSON, nullable=False, comment="model, answered and questions; or empty."),
    sa.Column("error", sa.Text, nullable=False),
    sa.Column("base_wins", sa.Integer, comment="Questions in which its score is higher; null without a benchmark."),
    sa.Column("tuned_wins", sa.Integer),
    sa.Column("ties", sa.Integer),
    sa.Column("p_value", sa.Float, comment="One-sided, that the tuned model is not better."),
    sa.Column("report", sa.String(64), comment="Version of the report; null without a benchmark."),
    sa.Column("created_at", Timestamp, nullable=False),
    sa.Column("started_at", Timestamp),
    sa.Column("finished_at", Timestamp),
    sa.Column("locked_by", sa.String(200), comment="Process that works on it; null if none."),
    sa.Column("locked_until", Timestamp, comment="When the lock of a killed process ends."),
    sa.UniqueConstraint("loop", "idempotency_key"),
    sa.Index(None, "loop", "created_at"),
    comment="Comparisons that a program or the console asked for. They judge no data and promote nothing.",
)

comparison_pairs = sa.Table(
    "comparison_pairs",
    metadata,
    sa.Column("comparison_id", sa.String(40), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, comment="1, 2, 3, ... in each comparison."),
    sa.Column("prompt", sa.Text, nullable=False),
    sa.Column("base_answer", sa.Text, nullable=False),
    sa.Column("tuned_answer", sa.Text, nullable=False),
    sa.Column("swapped", sa.Boolean, nullable=False, comment="The tuned model's answer is shown first, as a."),
    comment="Two answers to one prompt, which people see without the models' names.",
)

comparison_votes = sa.Table(
    "comparison_votes",
    metadata,
    sa.Column("comparison_id", sa.String(40), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, comment="Of the pair."),
    sa.Column("voter", sa.String(200), primary_key=True, comment="The API key's name, or the OS user."),
    sa.Column("choice", sa.String(10), nullable=False, comment="base, tuned or tie."),
    sa.Column("created_at", Timestamp, nullable=False),
    comment="Blind votes on pairs; one of each voter on each pair.",
)

budget_tests = sa.Table(
    "budget_tests",
    metadata,
    sa.Column("loop", sa.String(60), primary_key=True),
    sa.Column("trial", sa.String(64), primary_key=True, comment="Hash of the models, benchmark and settings compared."),
    sa.Column("budget", sa.String(64), nullable=False, comment="Hash of the first benchmark that spent from it."),
    sa.Column("number", sa.Integer, nullable=False, comment="Running number of the test in its budget."),
    sa.Column("comparison_id", sa.String(64), nullable=False),
    sa.Column("created_at", Timestamp, nullable=False),
    sa.UniqueConstraint("loop", "budget", "number"),
    comment="Tests that were spent from error budgets (gate.significance: required).",
)

budget_benchmarks = sa.Table(
    "budget_benchmarks",
    metadata,
    sa.Column("loop", sa.String(60), primary_key=True),
    sa.Column("benchmark_sha256", sa.String(64), primary_key=True),
    sa.Column("budget", sa.String(64), nullable=False),
    sa.Column("questions", sa.JSON, nullable=False, comment="Hashes of the prompts."),
    sa.Column("created_at", Timestamp, nullable=False),
    comment="Benchmarks that spent from an error budget; one that shares most of its questions continues it.",
)

regression_questions = sa.Table(
    "regression_questions",
    metadata,
    sa.Column("loop", sa.String(60), primary_key=True),
    sa.Column("interaction_id", sa.String(36), primary_key=True),
    sa.Column("content_hash", sa.String(64), nullable=False, comment="As of its example, which may change."),
    sa.Column("model_id", sa.String(64), nullable=False, comment="The version whose promotion fixed the answer."),
    sa.Column("prompt", sa.Text, nullable=False, comment="Redacted, as history and expected."),
    sa.Column("history", sa.JSON, nullable=False, comment="Messages before the prompt."),
    sa.Column("expected", sa.Text, nullable=False, comment="The correction."),
    sa.Column("created_at", Timestamp, nullable=False),
    comment="Corrections that a promotion fixed. Asked while the example is what it was then.",
)

sealed_looks = sa.Table(
    "sealed_looks",
    metadata,
    sa.Column("loop", sa.String(60), primary_key=True),
    sa.Column("deployment_id", sa.Integer, primary_key=True, comment="The promotion at which it was asked."),
    sa.Column("model_id", sa.String(64), nullable=False),
    sa.Column("sealed_sha256", sa.String(64), nullable=False, comment="Of the sealed benchmark."),
    sa.Column("benchmark_sha256", sa.String(64), nullable=False, comment="Of the open one."),
    sa.Column("settings_sha256", sa.String(64), nullable=False, comment="Of metric, schema and decoding."),
    sa.Column("sealed_scores", sa.JSON, nullable=False, comment="Question -> correct, total, cluster."),
    sa.Column("open_scores", sa.JSON, nullable=False),
    sa.Column("created_at", Timestamp, nullable=False),
    comment="Scores on evaluation.sealed_benchmark, with those on the open benchmark; no answers.",
)

deployment_targets = sa.Table(
    "deployment_targets",
    metadata,
    sa.Column("loop", sa.String(60), primary_key=True),
    sa.Column("target", sa.String(60), primary_key=True),
    sa.Column("wanted", sa.String(64), nullable=False, comment="Label of the release, such as v1.2.0 or base."),
    sa.Column("wanted_sha256", sa.String(64), nullable=False, comment="Of the wanted model."),
    sa.Column("observed", sa.String(64), comment="Label that the target served when it was last asked."),
    sa.Column("digest", sa.String(200), nullable=False, comment="The target's own identity of it; empty if none."),
    sa.Column("state", sa.String(20), nullable=False, comment="pending, active, failed, rejected or drifted."),
    sa.Column("tries", sa.Integer, nullable=False, comment="Failed tries to reach the wanted release."),
    sa.Column("next_try_at", Timestamp, comment="Null: at once, or not before the wanted release changes."),
    sa.Column("last_error", sa.Text, nullable=False),
    sa.Column("facts", sa.JSON, nullable=False, comment="Agreement, score, whether it reads control tokens; config."),
    sa.Column("observed_at", Timestamp),
    sa.Column("locked_by", sa.String(200), comment="Process that works on the target; null if none."),
    sa.Column("locked_until", Timestamp, comment="When the lock of a killed process ends."),
    comment="Where each deployment target of a loop stands; the champion is what is wanted.",
)

alerts = sa.Table(
    "alerts",
    metadata,
    sa.Column("loop", sa.String(60), primary_key=True),
    sa.Column("key", sa.String(200), primary_key=True, comment="Names the event, so that its alert is sent once."),
    sa.Column("kind", sa.String(20), nullable=False),
    sa.Column("title", sa.Text, nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("link", sa.Text, nullable=False, comment="Path or URL of the details; empty if there is none."),
    sa.Column("created_at", Timestamp, nullable=False),
    sa.Column(
        "deliveries",
        sa.JSON(none_as_null=True),
        comment="Receiver -> why it did not get it, empty if it did; null while it is sent.",
    ),
    sa.Index(None, "loop", "created_at"),
    comment="What people were told.",
)

trainings = sa.Table(
    "trainings",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True, comment="Version of the adapter."),
    sa.Column("loop", sa.String(60), primary_key=True),
    sa.Column("run_id", sa.String(64), nullable=False, comment="The Dagster run, which has the progress."),
    sa.Column("dataset", sa.String(64), nullable=False, comment="Version of the dataset."),
    sa.Column(
        "initial_adapter",
        sa.String(64),
        comment="Version of the adapter that it was warm-started from; null for the base model.",
    ),
    sa.Column("method", sa.String(20), nullable=False),
    sa.Column("mode", sa.String(20), nullable=False),
    sa.Column("device", sa.String(200), nullable=False),
    sa.Column("examples", sa.Integer, nullable=False),
    sa.Column("steps", sa.Integer, nullable=False),
    sa.Column("loss_before", sa.Float, nullable=False),
    sa.Column("loss_after", sa.Float, nullable=False),
    sa.Column("tokens_per_second", sa.Float, nullable=False),
    sa.Column("wall_seconds", sa.Float, nullable=False),
    sa.Column("peak_memory_bytes", sa.BigInteger, nullable=False),
    sa.Column("watermark", sa.BigInteger, nullable=False),
    sa.Column("created_at", Timestamp, nullable=False),
    comment="Finished trainings: one row for each adapter, which outlives its files.",
)

training_jobs = sa.Table(
    "training_jobs",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True, comment="ftjob- and 24 hexadecimal digits."),
    sa.Column("loop", sa.String(60), nullable=False),
    sa.Column("origin", sa.String(20), nullable=False, comment="api, openai, console, cli, sensor, schedule or ui."),
    sa.Column("created_by", sa.String(200), nullable=False, comment="The API key's name, or the OS user."),
    sa.Column("idempotency_key", sa.String(200), comment="Chosen by the client; one job for each key of a loop."),
    sa.Column("request_sha256", sa.String(64), comment="Of the request with that key."),
    sa.Column("settings", sa.JSON, nullable=False, comment="Settings of this job that differ from the loop's."),
    sa.Column("dataset", sa.String(64), comment="Version of the dataset; null until it is built."),
    sa.Column("suffix", sa.String(64)),
    sa.Column("metadata", sa.JSON, nullable=False, comment="The client's own facts."),
    sa.Column(
        "request",
        sa.JSON(none_as_null=True),
        comment="The client's request, which answers repeat; null if there was none.",
    ),
    sa.Column(
        "status", sa.String(20), nullable=False, comment="pending, running, paused, completed, failed or canceled."
    ),
    sa.Column("wanted", sa.String(20), comment="pause or cancel: asked for, while its run still ends; else null."),
    sa.Column("error", sa.Text, nullable=False),
    sa.Column("progress", sa.JSON, nullable=False, comment="Newest progress of the training, or empty."),
    sa.Column("adapter", sa.String(64), comment="Version of the trained adapter."),
    sa.Column("model_sha256", sa.String(64), comment="Of the exported model."),
    sa.Column("report", sa.String(64), comment="Version of the report that judges it."),
    sa.Column("created_at", Timestamp, nullable=False),
    sa.Column("started_at", Timestamp),
    sa.Column("finished_at", Timestamp),
    sa.UniqueConstraint("loop", "idempotency_key"),
    sa.Index(None, "loop", "created_at"),
    comment="Training jobs, however they were started; a job has one id and a list of Dagster runs.",
)

training_job_runs = sa.Table(
    "training_job_runs",
    metadata,
    sa.Column("run_id", sa.String(64), primary_key=True, comment="Dagster's run."),
    sa.Column("job_id", sa.String(40), nullable=False),
    sa.Column("number", sa.Integer, nullable=False, comment="1 for the first run, one more for each resumption."),
    sa.Column("created_at", Timestamp, nullable=False),
    sa.UniqueConstraint("job_id", "number"),
)

training_job_events = sa.Table(
    "training_job_events",
    metadata,
    sa.Column("job_id", sa.String(40), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, comment="1, 2, 3, ... in each job."),
    sa.Column("created_at", Timestamp, nullable=False),
    sa.Column("kind", sa.String(20), nullable=False, comment="message or metrics."),
    sa.Column("level", sa.String(10), nullable=False, comment="info, warn or error."),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("data", sa.JSON, nullable=False, comment="Progress of the training, for metrics."),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("name", sa.String(100), nullable=False),
    sa.Column("secret_sha256", sa.String(64), nullable=False, unique=True),
    sa.Column("scopes", sa.String(100), nullable=False, comment="infer, feedback, view, admin; separated by commas."),
    sa.Column("created_at", Timestamp, nullable=False),
    sa.Column("revoked_at", Timestamp),
)

audit_log = sa.Table(
    "audit_log",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("created_at", Timestamp, nullable=False),
    sa.Column("loop", sa.String(60), nullable=False),
    sa.Column("actor", sa.String(200), nullable=False, comment="The API key's name, or the OS user."),
    sa.Column("action", sa.String(60), nullable=False, comment="Such as review approve or model switch."),
    sa.Column("subject", sa.String(200), nullable=False, comment="What it is about: an id or a name."),
    sa.Column("detail", sa.Text, nullable=False, comment="Further facts or the reason; no text of interactions."),
    sa.Column("outcome", sa.Text, comment="Empty if it succeeded, else the error; null while it runs or was killed."),
    sa.Index(None, "loop", "id"),
    comment="What people did in the console.",
)
