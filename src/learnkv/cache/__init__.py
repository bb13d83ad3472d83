"""A compressed cache: storage, layers, eviction."""
