"""Evaluation: resumable runs, and metrics with confidence intervals."""
