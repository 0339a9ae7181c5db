"""Interchangeable connectors between vision encoders and language models, compared fairly."""

__version__ = "0.1.0"
