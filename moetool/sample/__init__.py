"""Self-generated text, such as replay for a model whose training data is not public."""
