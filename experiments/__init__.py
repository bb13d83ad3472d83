"""Studies, comparisons and the training of the reference model; not part of the wheel."""
