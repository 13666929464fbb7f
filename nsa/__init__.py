"""Native sparse attention on local heads."""

from nsa.attention import nsa_attention
from nsa.core import NSACore

__all__ = ["NSACore", "nsa_attention"]
