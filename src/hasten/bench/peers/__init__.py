"""Other engines on the same weights: where they are, what they run, and how it is made for them."""
