"""Comparing policies on one model: every policy and every budget from one prefill per batch."""
