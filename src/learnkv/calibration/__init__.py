"""What is measured of a model once, so that methods which read tables can be used with it."""
