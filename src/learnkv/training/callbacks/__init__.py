"""Checkpoints, progress, logs and pictures of a run."""
