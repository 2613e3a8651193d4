"""The paper's laws (arXiv 2507.05197): loss of model size and of compute (section 4.4), and peak learning rate and
batch size of pre-training (appendix D.3).

Of the latter the paper says "all in millions"; with that unit they give a learning rate ten times too low and batches
of 78,607. With parameters in units of 2^20 and tokens in units of 2^30 they give the paper's own settings, 1940 and
4343 comparisons and 1.4e-5 and 1.67e-5, so these are the units here. They were fitted on models up to 0.92B parameters
and applied by the paper at 1.8B and 7B; beyond that they are an extrapolation.
"""

from dataclasses import dataclass, fields

from megatron_polar.errors import UserError

_PARAMETER_UNIT, _TOKEN_UNIT = 2**20, 2**30
FITTED_PARAMETERS, FITTED_REWARD_TOKENS = (115.52e6, 924.09e6), (23.9e9, 103.72e9)
"""Of the runs that the laws of learning rate and batch were fitted to (figures 5 and 6)."""
FEWEST_TOKENS = 1e8
"""Of reward-model pre-training: below it the laws, which were fitted on billions, say nothing."""


@dataclass(frozen=True)
class Sizes:
    """What the laws depend on.

    `reward_tokens` are counted as the paper does: every comparison as two full sequences, prompt and reference in both.
    """

    parameters: float
    """Nominal size of the model, as the paper has it (1.8e9, not the 1.70e9 weights of the reward model)."""
    base_tokens: float
    """Tokens on which the base model was pre-trained."""
    reward_tokens: float
    """Tokens of reward-model pre-training."""

    def __post_init__(self):
        for field in fields(self):
            if not 0 < getattr(self, field.name) < float("inf"):
                name = field.name.replace("_", " ")
                raise UserError(f"{name} {getattr(self, field.name)} must be above 0 for the paper's laws")


SIZES: dict[str, Sizes] = {
    # The paper's two runs, appendix D.1.2.
    "polar_1_8b": Sizes(1.8e9, base_tokens=2.5e12, reward_tokens=0.94e12),
    "polar_7b": Sizes(7e9, base_tokens=4.0e12, reward_tokens=3.6e12),
    # There are no such POLAR models. Assumed: the paper's whole corpus, and the tokens that the base models' reports
    # give, 2.0T to 2.6T for InternLM2 (arXiv 2403.17297; the upper end is taken), 18T for Qwen2.5 (arXiv 2412.15115).
    "polar_20b": Sizes(20e9, base_tokens=2.6e12, reward_tokens=3.6e12),
    "polar_72b": Sizes(72e9, base_tokens=18e12, reward_tokens=3.6e12),
}


@dataclass(frozen=True)
class PublishedLaw:
    """L = coefficient * x^-exponent, as it was published."""

    coefficient: float
    exponent: float
    r_squared: float
    source: str
    remark: str

    def loss(self, x: float) -> float:
        return self.coefficient * x**-self.exponent


PUBLISHED: dict[str, PublishedLaw] = {
    "loss_of_parameters": PublishedLaw(
        0.9,
        0.0425,
        0.9886,
        source="arXiv 2507.05197, section 4.4",
        remark="five models of 50M to 1B parameters, up to 54B tokens; whether N has the embedding is not said",
    ),
    "loss_of_compute": PublishedLaw(
        2.4,
        0.0342,
        0.9912,
        source="arXiv 2507.05197, section 4.4",
        remark="the figure's axis says Flop/s-days, and only FLOPs fit its values; how they were counted is not said. "
        "Its level does not fit the law of N (1B parameters and 54B tokens give 0.48 here and 0.37 there)",
    ),
}


def peak_learning_rate(sizes: Sizes) -> float:
    """LR = 0.0002306 N^0.01125 D_p^-0.66587 D_rm^0.33916, for the batch that `batch_size` gives."""
    parameters, base, reward = _in_units(sizes)
    return 0.0002306 * parameters**0.01125 * base**-0.66587 * reward**0.33916


def batch_size(sizes: Sizes) -> float:
    """Comparisons a step: 31.9032 N^0.06944 D_rm^0.52997."""
    parameters, _, reward = _in_units(sizes)
    return 31.9032 * parameters**0.06944 * reward**0.52997


def _in_units(sizes: Sizes) -> tuple[float, float, float]:
    return sizes.parameters / _PARAMETER_UNIT, sizes.base_tokens / _TOKEN_UNIT, sizes.reward_tokens / _TOKEN_UNIT
