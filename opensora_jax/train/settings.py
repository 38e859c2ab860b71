"""What a training is told beside its task, optimizer and data; importing this is cheap."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What a step is made of.

    Attributes:
      seed: of all that is random in the training, parameters included.
      ema_decay: of the exponential moving average of parameters.
      accumulate: microbatches of a step.
    """

    seed: int
    ema_decay: float
    accumulate: int = 1


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """How long to train and what to do on the way; units are optimizer steps.

    Attributes:
      keep_checkpoints: how many of the last ones are kept.
      keep_every: checkpoints of multiples of it are kept for good; 0: none.
      max_skipped_steps: so many in a row that are not finite end the training.
      profile: the first and the last step to trace; empty: none.
    """

    steps: int
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int = 2
    keep_every: int = 0
    max_skipped_steps: int = 10
    profile: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Throughput:
    """What turns the seconds of a step into the speeds that are logged.

    Attributes:
      tokens_per_step: over all devices.
      flops_per_step: model FLOPs over all devices; 0: not known.
      peak_flops: FLOP/s of a device; 0: not known.
    """

    tokens_per_step: int
    flops_per_step: float = 0.0
    peak_flops: float = 0.0
