"""Policies of learnkv inside other libraries, each an optional extra."""
