"""Policies: planning, online and layerwise eviction."""
