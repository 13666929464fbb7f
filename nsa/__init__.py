"""Native sparse attention on local heads."""

from nsa.attention import check_backend, nsa_attention
from nsa.core import NSACore
from nsa.documents import Documents

__all__ = ["Documents", "NSACore", "check_backend", "nsa_attention"]
