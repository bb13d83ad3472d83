"""Suites of tasks on a real model, with the pages that the documentation has of them."""
