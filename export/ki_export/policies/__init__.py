"""What makes a model a policy, read from each checkpoint format and never assumed.

A format records some of the contract; the rest is given by name or file. What neither tells is listed, and stops the
export.

Imports: of ki_edge: bundle, checkpoints.layout, files, policy.
"""

from .description import PolicyDescription, describe_policy
from .files import PolicyFiles
from .request import PolicyRequest
from .vocabulary import decode_vocabulary, has_fast_head

__all__ = ["PolicyDescription", "PolicyFiles", "PolicyRequest", "decode_vocabulary", "describe_policy", "has_fast_head"]
