"""Policies on disk and on the hub."""
