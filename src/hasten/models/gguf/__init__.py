"""GGUF files, the format of llama.cpp: reading one, and what its names and numbers mean.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
