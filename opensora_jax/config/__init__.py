"""The check of a configuration, of the files that it names, and the table of stages."""

from opensora_jax.config.fields import RULES
from opensora_jax.config.inputs import check_inputs
from opensora_jax.config.rules import check
from opensora_jax.config.stages import STAGES

__all__ = ["RULES", "STAGES", "check", "check_inputs"]
