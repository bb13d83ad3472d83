"""Attaching a model, reading prompts, generating."""
