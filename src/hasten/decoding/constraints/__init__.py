"""What the text of an output may be: one kind of constraint a file."""
