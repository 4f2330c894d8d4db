"""Pretraining of video world models: predict the features of what is hidden, not its pixels."""

__version__ = "0.1.0"
