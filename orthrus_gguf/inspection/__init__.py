"""What is in a GGUF file: sizes, memory needs, damage, differences. Needs no runtime."""
