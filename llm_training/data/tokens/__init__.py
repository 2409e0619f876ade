"""Documents as token ids, and the files that hold them."""
