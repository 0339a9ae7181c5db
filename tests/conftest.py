"""What has to happen before any test imports transformers."""

from tests import timm_parts  # noqa: F401
