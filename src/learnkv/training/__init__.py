"""Training of policies by distillation from the full cache."""
