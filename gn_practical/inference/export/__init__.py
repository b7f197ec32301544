"""Trained models as files that run without the code of the model."""
