"""Text that a model writes itself, such as replay for a model whose training data is not public."""
