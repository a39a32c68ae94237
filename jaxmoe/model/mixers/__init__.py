"""Token mixers: what passes between the tokens of a document."""
