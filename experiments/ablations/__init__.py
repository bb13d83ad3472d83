"""Methods with one thing changed, and why they score as they do."""
