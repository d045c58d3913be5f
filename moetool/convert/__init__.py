"""The same model with another dtype, file size or layout of experts, or with an adapter merged."""
