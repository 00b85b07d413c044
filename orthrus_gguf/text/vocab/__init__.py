"""Vocabularies in GGUF metadata: read, checked, and handed to the libraries that apply them."""
