"""The errors that a user can do something about."""

from finetune_pipeline.artifacts import ArtifactError
from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.database import DatabaseError
from finetune_pipeline.database.api_keys import ApiKeyError
from finetune_pipeline.deployment.target import TargetError
from finetune_pipeline.evaluation.benchmark import BenchmarkError
from finetune_pipeline.evaluation.comparison import ComparisonError
from finetune_pipeline.evaluation.metrics import MetricError
from finetune_pipeline.evaluation.report import ReportError
from finetune_pipeline.export.process import ExportError
from finetune_pipeline.feedback import FeedbackError
from finetune_pipeline.feedback.review import ReviewError
from finetune_pipeline.inference.errors import EngineError
from finetune_pipeline.orchestrator import OrchestratorError
from finetune_pipeline.ray_session import ClusterError
from finetune_pipeline.registry.model_versions import RegistryError
from finetune_pipeline.registry.requested_comparisons import RequestedComparisonError
from finetune_pipeline.registry.training_jobs import JobError
from finetune_pipeline.schemas import SchemaError
from finetune_pipeline.settings import SettingsError
from finetune_pipeline.sources.source_record import SourceError
from finetune_pipeline.training.job import TrainingError

EXPECTED = (
    ArtifactError,
    BenchmarkError,
    ClusterError,
    ComparisonError,
    CurationError,
    DatabaseError,
    EngineError,
    ExportError,
    FeedbackError,
    ApiKeyError,
    JobError,
    MetricError,
    OrchestratorError,
    RegistryError,
    ReportError,
    RequestedComparisonError,
    ReviewError,
    SchemaError,
    SettingsError,
    SourceError,
    TargetError,
    TrainingError,
)
"""Errors whose message says what was found and what to do; any other exception is a bug and keeps its traceback."""
