"""What `orthrus-bench compare` knows: strategies side by side on the same prompts."""
