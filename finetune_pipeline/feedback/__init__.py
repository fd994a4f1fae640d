"""What people thought of the answers: rewards, verdicts, and the store of events."""
