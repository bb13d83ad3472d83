"""A study that lists its comparisons: measured by forced and by generated scores, each in tables of its own."""
