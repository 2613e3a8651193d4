"""How large the study is: for two CPU cores, for a GPU, and for a test. All numbers that a run depends on are here."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Shape:
    """A model's shape; `lr` is the peak learning rate of pre-training at this width."""

    hidden_size: int
    num_layers: int
    ffn_hidden_size: int
    num_heads: int
    num_query_groups: int
    lr: float


@dataclass(frozen=True)
class FineTuning:
    """One task: `lr`, steps' worth of data in epochs, and where answers are cut, in tokens."""

    lr: float
    num_epochs: float
    max_response_length: int
    max_sequence_length: int


@dataclass(frozen=True)
class Size:
    """Every knob of the study. Counts are of prompts, comparisons or tokens as named; seeds count from 1."""

    name: str
    shapes: dict[str, Shape]
    main_shape: str
    # policies
    alpaca_prompt_words: int
    gsm8k_prompt_words: int
    gsm8k_prompts: int
    gsm8k_heldout_prompts: int
    alpaca_fidelity: float
    gsm8k_fidelity: float
    alpaca_max_words: int
    gsm8k_max_words: int
    """Of a trajectory: more than the answers that are imitated have, so that imitations that stray come to an end."""
    gsm8k_answer_words: int
    """How much of the end of a solution is taken."""
    heldout_per_prompt: int
    vocab_size: int
    # base models
    base_tokens: int
    base_context: int
    """Where documents are cut, in tokens."""
    base_batch_tokens: int
    base_lr: float
    # pre-training
    num_steps: int
    global_batch_size: int
    max_sequence_length: int
    max_response_length: int
    max_tokens_per_micro_batch: int
    precision: str
    validation_comparisons: int
    main_seeds: int
    """Runs of the main shape from its base model with all steps: what fine-tuning begins from."""
    sweep_share: float
    """Of the steps: after so many, sizes, K and the start from random weights are compared."""
    base_seeds: dict[str, int]
    random_seeds: dict[str, int]
    main_candidates: int
    """K of all runs but those that compare K."""
    candidates: tuple[int, ...]
    data_shares: tuple[float, ...]
    ablation_seeds: int
    # fine-tuning
    finetune_seeds: int
    gsm8k_folds: int
    gsm8k_pairs: int
    gsm8k: FineTuning
    alpaca: FineTuning
    finetune_batch_size: int
    preference_limit: int | None
    rmb_limit: int | None
    # machine
    device: str
    parallel_jobs: int
    forks: bool
    flops_per_second: float

    def describe(self) -> dict:
        """As study.json has it."""
        return asdict(self)


CPU = Size(
    name="cpu",
    shapes={
        "xxs": Shape(32, 6, 88, 2, 2, lr=3.0e-3),
        "xs": Shape(48, 6, 128, 3, 3, lr=3.0e-3),
        "s": Shape(64, 6, 176, 4, 4, lr=3.0e-3),
        "m": Shape(96, 6, 256, 6, 6, lr=3.0e-3),
    },
    main_shape="s",
    alpaca_prompt_words=30,
    gsm8k_prompt_words=33,
    gsm8k_prompts=1500,
    gsm8k_heldout_prompts=300,
    alpaca_fidelity=0.9,
    gsm8k_fidelity=0.97,
    alpaca_max_words=18,
    gsm8k_max_words=40,
    gsm8k_answer_words=24,
    heldout_per_prompt=3,
    vocab_size=2048,
    base_tokens=2_000_000,
    base_context=384,
    base_batch_tokens=1024,
    base_lr=4.0e-3,
    num_steps=800,
    global_batch_size=32,
    max_sequence_length=512,
    max_response_length=128,
    max_tokens_per_micro_batch=4096,
    precision="fp32",
    validation_comparisons=192,
    main_seeds=5,
    sweep_share=0.5,
    base_seeds={"xxs": 3, "xs": 3, "s": 3, "m": 3},
    random_seeds={"s": 3},
    main_candidates=4,
    candidates=(2, 4, 8),
    data_shares=(0.125, 0.25, 0.5),
    ablation_seeds=3,
    finetune_seeds=5,
    gsm8k_folds=3,
    gsm8k_pairs=4,
    gsm8k=FineTuning(lr=1.0e-3, num_epochs=2.0, max_response_length=128, max_sequence_length=512),
    alpaca=FineTuning(lr=1.0e-3, num_epochs=0.25, max_response_length=128, max_sequence_length=640),
    finetune_batch_size=32,
    preference_limit=None,
    rmb_limit=2000,
    device="cpu",
    parallel_jobs=2,
    forks=True,
    flops_per_second=2.5e10,
)

GPU = Size(
    name="gpu",
    shapes={
        "xs": Shape(128, 6, 352, 4, 2, lr=1.0e-3),
        "s": Shape(256, 6, 688, 4, 2, lr=7.0e-4),
        "m": Shape(384, 6, 1024, 6, 3, lr=6.0e-4),
        "l": Shape(512, 8, 1376, 8, 4, lr=5.0e-4),
        "xl": Shape(768, 12, 2048, 12, 4, lr=3.0e-4),
    },
    main_shape="l",
    alpaca_prompt_words=200,
    gsm8k_prompt_words=200,
    gsm8k_prompts=6500,
    gsm8k_heldout_prompts=700,
    alpaca_fidelity=0.75,
    gsm8k_fidelity=0.97,
    alpaca_max_words=160,
    gsm8k_max_words=240,
    gsm8k_answer_words=160,
    heldout_per_prompt=6,
    vocab_size=8192,
    base_tokens=40_000_000,
    base_context=1024,
    base_batch_tokens=32768,
    base_lr=3.0e-3,
    num_steps=1000,
    global_batch_size=128,
    max_sequence_length=2048,
    max_response_length=512,
    max_tokens_per_micro_batch=32768,
    precision="bf16",
    validation_comparisons=512,
    main_seeds=6,
    sweep_share=1.0,
    base_seeds={"xs": 3, "s": 3, "m": 3, "l": 3, "xl": 3},
    random_seeds={"xs": 1, "s": 1, "m": 1, "l": 3, "xl": 1},
    main_candidates=4,
    candidates=(2, 4, 8),
    data_shares=(0.0625, 0.125, 0.25, 0.5),
    ablation_seeds=3,
    finetune_seeds=6,
    gsm8k_folds=3,
    gsm8k_pairs=4,
    gsm8k=FineTuning(lr=1.0e-4, num_epochs=2.0, max_response_length=512, max_sequence_length=2048),
    alpaca=FineTuning(lr=1.0e-4, num_epochs=1.0, max_response_length=512, max_sequence_length=2048),
    finetune_batch_size=32,
    preference_limit=None,
    rmb_limit=None,
    device="cuda",
    parallel_jobs=1,
    forks=False,
    flops_per_second=5e13,
)

SMOKE = Size(
    name="smoke",
    shapes={
        "a": Shape(16, 1, 32, 2, 1, lr=2.0e-3),
        "b": Shape(24, 1, 48, 2, 1, lr=2.0e-3),
        "c": Shape(32, 1, 64, 2, 1, lr=2.0e-3),
        "d": Shape(48, 1, 96, 2, 1, lr=2.0e-3),
    },
    main_shape="a",
    alpaca_prompt_words=40,
    gsm8k_prompt_words=60,
    gsm8k_prompts=20,
    gsm8k_heldout_prompts=5,
    alpaca_fidelity=0.75,
    gsm8k_fidelity=0.9,
    alpaca_max_words=16,
    gsm8k_max_words=48,
    gsm8k_answer_words=48,
    heldout_per_prompt=2,
    vocab_size=320,
    base_tokens=1024,
    base_context=128,
    base_batch_tokens=256,
    base_lr=2.0e-3,
    num_steps=2,
    global_batch_size=4,
    max_sequence_length=512,
    max_response_length=64,
    max_tokens_per_micro_batch=2048,
    precision="fp32",
    validation_comparisons=4,
    main_seeds=1,
    sweep_share=0.5,
    base_seeds={"a": 1, "b": 1, "c": 1, "d": 1},
    random_seeds={"a": 1},
    main_candidates=2,
    candidates=(2, 4),
    data_shares=(0.5,),
    ablation_seeds=1,
    finetune_seeds=1,
    gsm8k_folds=3,
    gsm8k_pairs=2,
    gsm8k=FineTuning(lr=5.0e-4, num_epochs=1.0, max_response_length=64, max_sequence_length=512),
    alpaca=FineTuning(lr=5.0e-4, num_epochs=1.0, max_response_length=32, max_sequence_length=512),
    finetune_batch_size=4,
    preference_limit=6,
    rmb_limit=4,
    device="cpu",
    parallel_jobs=2,
    forks=True,
    flops_per_second=1e9,
)

SIZES = {size.name: size for size in (CPU, GPU, SMOKE)}
