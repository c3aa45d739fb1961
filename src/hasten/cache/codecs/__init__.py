"""Page codecs, one a file: the form in which keys and values are stored."""
