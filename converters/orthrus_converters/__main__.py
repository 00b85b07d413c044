"""`python -m orthrus_converters` is `orthrus-convert`."""

from orthrus_gguf.entry import convert

if __name__ == "__main__":
    convert()
