"""Who gets how many tokens in a step: one policy a file."""
