"""The bundled reference model: a small Llama that retrieves, and the recipe that trained it."""
