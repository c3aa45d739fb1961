"""Architectures (one a file, named after the checkpoint's model_type), loading, tokenizers."""
