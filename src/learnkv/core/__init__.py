"""The abstract bases, and what passes between them."""
