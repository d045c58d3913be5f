"""Read and write Hugging Face safetensors folders, without any knowledge of models."""
