"""What people thought of the answers: rewards, verdicts, the store of events, and the client that fills it."""

from finetune_pipeline.feedback.client import FeedbackClient, FeedbackError

__all__ = ["FeedbackClient", "FeedbackError"]
