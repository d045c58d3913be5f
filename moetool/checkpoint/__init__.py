"""Hugging Face safetensors folders, read and written without knowing what a model is."""
