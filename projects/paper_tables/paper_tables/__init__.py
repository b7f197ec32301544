"""Tables 1 and 2 of the paper: what they sample, and the numbers beside theory."""
