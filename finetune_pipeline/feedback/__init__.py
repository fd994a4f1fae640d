"""Feedback: the event store, rewards, review decisions, and the client with which applications fill the store."""

from finetune_pipeline.feedback.client import FeedbackClient, FeedbackError

__all__ = ["FeedbackClient", "FeedbackError"]
