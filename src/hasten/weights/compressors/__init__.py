"""What makes quantized weights out of a checkpoint's numbers, one a file."""
