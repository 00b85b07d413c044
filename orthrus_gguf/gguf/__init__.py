"""GGUF files: names of keys and tensors, the reader, the writer."""
