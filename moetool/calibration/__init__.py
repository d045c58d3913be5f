"""Statistics of a model's experts on a text, as sums, measured once and cached."""
