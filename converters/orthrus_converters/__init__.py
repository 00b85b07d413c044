"""Make Orthrus GGUF files from Hugging Face checkpoints. The runtime never imports this."""
