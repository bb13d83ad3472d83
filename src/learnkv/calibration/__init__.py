"""One-time measurements of a model, for methods that read tables."""
