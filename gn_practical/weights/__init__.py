"""Weights from elsewhere: reading them, what they need, and what ours say about themselves."""
