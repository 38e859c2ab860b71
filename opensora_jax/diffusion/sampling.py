"""What is to be chosen where samples are drawn; loaded without JAX."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How samples are drawn.

    Attributes:
      steps: from noise to data; a step of heun calls the network twice.
      guidance: scale of classifier-free guidance; 1: off.
      guidance_from, guidance_to: noise levels, from 0 (data) to 1 (noise), between which there is
        guidance (arXiv:2404.07724).
      guidance_rescale: share to which guided outputs are brought back to the standard deviation of
        the conditional ones (arXiv:2305.08891).
      sampler: one that the objective has; auto: its first.
      eta: share of the noise that ddim draws anew in each step.
      temperature: of codes that are drawn by their probabilities.
      top_p: share of the probability that the likeliest codes hold, of which alone is drawn.
      choice_temperature: how far chance, and not how sure the network is, says which of the masked
        codes are kept first (arXiv:2202.04200).

    Raises:
      ValueError: no level is between those of guidance.
    """

    steps: int = 50
    guidance: float = 4.0
    guidance_from: float = 0.0
    guidance_to: float = 1.0
    guidance_rescale: float = 0.0
    sampler: str = "auto"
    eta: float = 0.0
    temperature: float = 1.0
    top_p: float = 1.0
    choice_temperature: float = 4.5

    def __post_init__(self):
        if self.guidance_to < self.guidance_from:
            raise ValueError(
                f"guidance_to={self.guidance_to:g}: expected at least guidance_from="
                f"{self.guidance_from:g}"
            )
