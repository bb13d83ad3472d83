"""Prompts and text: RULER task generators, retrieval episodes for training, windows of text data sets."""
