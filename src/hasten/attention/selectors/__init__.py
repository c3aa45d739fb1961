"""Page selection, one method a file: which positions a row reads."""
