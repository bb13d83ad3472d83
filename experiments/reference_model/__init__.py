"""How the reference model was trained."""
