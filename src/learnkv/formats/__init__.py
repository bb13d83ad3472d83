"""Head scores, gates and budget tables as files that other projects read and write, one module per format."""
