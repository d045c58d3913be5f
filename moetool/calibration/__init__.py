"""What a model's experts do on some text, as sums that add up, measured once and kept."""
