"""Weight formats, one a file."""
