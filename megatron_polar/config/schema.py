"""Every knob of a run, as frozen dataclasses. The string below a field says what it means and its unit.

Parallel sizes and model shapes use Megatron's spelling, the method's knobs the paper's (arXiv 2507.05197).
`docs/configuration.md` is made from this file by `tools/write_configuration_docs.py`.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RunSection:
    directory: str
    """Run directory: checkpoints, metrics, TensorBoard files and the report go here."""
    seed: int = 1234
    """Seed of the initial weights, of dropout and of the order and draw of comparisons."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to run: `auto` takes CUDA where torch sees a GPU, else the CPU with gloo."""
    deterministic: bool = False
    """Ask torch and Transformer Engine for deterministic kernels (slower on GPUs; the CPU is always deterministic)."""


@dataclass(frozen=True)
class ModelSection:
    preset: str | None = None
    """Named architecture (`polar_1_8b`, `polar_7b`, ...; see `config/presets.py`); the fields below override it."""
    num_layers: int | None = None
    """Transformer layers."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Width of the SwiGLU hidden layer."""
    num_attention_heads: int | None = None
    """Query heads."""
    num_query_groups: int | None = None
    """Key/value heads (grouped-query attention); equal to `num_attention_heads` without grouping."""
    kv_channels: int | None = None
    """Dimension of one head, an even number; default `hidden_size / num_attention_heads`."""
    rotary_base: float | None = None
    """RoPE base (theta)."""
    rope_scaling_factor: float | None = None
    """Llama 3.1's scaling of RoPE frequencies by this factor (low 1, high 4, 8192 original positions); null: none."""
    layernorm_epsilon: float | None = None
    """Epsilon of RMSNorm."""
    add_qkv_bias: bool | None = None
    """Bias on the QKV projection (Qwen2)."""
    qk_layernorm: bool | None = None
    """RMSNorm on queries and keys (Qwen3)."""
    vocab_size: int | None = None
    """Rows of the embedding before padding; default: the tokenizer's vocabulary size."""
    max_position_embeddings: int | None = None
    """Positions that the exported configuration promises, at least `data.max_sequence_length`, which is the default.
    Changes no weights."""
    make_vocab_size_divisible_by: int = 128
    """The embedding is padded to a multiple of this, independent of the layout."""
    init_method_std: float | None = None
    """Standard deviation of random initial weights; default: the preset's, else 0.02."""
    reward_head_init_std: float = 0.0
    """Standard deviation of the reward head's initial weights; 0 as in the released POLAR runs."""
    hidden_dropout: float = 0.0
    """Dropout after the embedding, attention and MLP, a probability."""
    attention_dropout: float = 0.0
    """Dropout on attention weights, a probability (`layout: padded` only, and not with `attention: dense`)."""
    attention: Literal["auto", "te", "sdpa", "dense"] = "auto"
    """Core attention: Transformer Engine, torch SDPA, or the dense-mask oracle; `auto` takes `te` for bf16 on CUDA,
    else `sdpa`."""
    last_layer: Literal["reward_rows", "all_rows"] = "reward_rows"
    """What the last layer computes behind its keys and values: only the rows that rewards are read from (exact, with 3
    to 4 % fewer FLOPs), or all rows."""
    transformer_impl: Literal["auto", "transformer_engine", "local"] = "auto"
    """Layer spec; `auto` takes Transformer Engine on CUDA, else Megatron-Core's local layers (on a GPU with a warning);
    `transformer_engine` refuses to run without."""


@dataclass(frozen=True)
class ParallelSection:
    tensor_model_parallel_size: int = 1
    """Ranks that split every layer."""
    pipeline_model_parallel_size: int = 1
    """Ranks that split the stack of layers."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline rank (interleaved 1F1B); null: plain 1F1B."""
    context_parallel_size: int = 1
    """Ranks that split each row of tokens (all-to-all over heads inside attention)."""
    sequence_parallel: bool = False
    """Split norms and dropout along the sequence between tensor-parallel ranks."""
    distributed_timeout_minutes: int = 30
    """How long a collective may wait for a missing rank, in minutes."""


@dataclass(frozen=True)
class DatasetSource:
    path: str
    """Directory written by `megatron-polar preprocess`."""
    weight: float | None = None
    """Share of the comparisons drawn from it, relative to the other weights; all null: proportional to size."""


@dataclass(frozen=True)
class CurriculumSection:
    record: bool = True
    """Count how often each pair of policies is ranked rightly, for the report; `contrast: by_difficulty` needs it."""
    interval: int = 100
    """Steps in a period: draws of a period use what was counted up to the end of the period before the last."""
    half_life: int = 4
    """Periods after which all counts are halved, so that they follow the model as it learns."""
    floor: float = 0.2
    """`by_difficulty`: share of the draws that are uniform all the same, from 0 to 1."""
    temperature: float = 1.0
    """`by_difficulty`: a pair is drawn in proportion to its error rate to the power 1/temperature; at least 0.05, and
    the larger, the closer to uniform."""
    prior_comparisons: float = 8.0
    """Comparisons, half of them wrong, that every pair is taken to have had before the first: few outcomes move its
    error rate little, and a pair never seen counts as hard as chance."""


@dataclass(frozen=True)
class DataSection:
    train: tuple[DatasetSource, ...]
    """Training datasets."""
    validation: tuple[DatasetSource, ...] = ()
    """Held-out datasets for evaluation inside the loop."""
    tokenizer: str | None = None
    """Tokenizer that the datasets must have been made with; default: the one stored in the first training dataset."""
    candidates_per_comparison: int = 2
    """K: candidates scored against one reference (2 = the paper); rankings shorter than K keep all their candidates."""
    contrast: Literal["uniform", "by_difficulty"] = "uniform"
    """Which policies of a document meet: any, or more often those whose order the model gets wrong (`curriculum`)."""
    curriculum: CurriculumSection = field(default_factory=CurriculumSection)
    """Counts of right and wrong orders for each pair of policies, and how `contrast: by_difficulty` uses them."""
    max_sequence_length: int = 16384
    """Longest full sequence (prompt + reference + prompt + candidate) in tokens; longer prompts lose their head."""
    layout: Literal["shared_prefix", "packed", "padded"] = "shared_prefix"
    """How comparisons lie in a row: prefix computed once, packed without sharing, or one padded row a sequence."""
    max_tokens_per_micro_batch: int = 32768
    """Physical tokens in one micro-batch (a row of packed comparisons; padded: rows x length)."""
    pad_to_multiple: int = 16
    """Row lengths are padded to a multiple of this times the tensor- and context-parallel sizes."""
    verify: Literal["full", "index"] = "full"
    """What is checked of the datasets before the first step: `full` hashes every token, shared between the ranks;
    `index` only sizes and the index."""
    loader: Literal["torch", "dali"] = "torch"
    """Whose worker processes prepare steps ahead, torch's or NVIDIA DALI's (needs nvidia-dali); the steps are the
    same."""
    num_workers: int = 2
    """Loader processes per rank that prepare batches ahead; 0 prepares them in the training process."""
    prefetch_factor: int = 4
    """Steps that each loader process prepares ahead."""


@dataclass(frozen=True)
class TrainSection:
    global_batch_size: int
    """Comparisons per optimizer step, over all ranks."""
    num_steps: int | None = None
    """Optimizer steps; give this or `num_epochs`."""
    num_epochs: float | None = None
    """Passes over the training data; give this or `num_steps`."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """`bf16` keeps fp32 main parameters and gradients; `fp32` runs everything in fp32."""
    fp8: Literal["off", "tensorwise", "blockwise", "delayed"] = "off"
    """Scaling recipe of FP8 GEMMs in Transformer Engine's layers (Hopper, with `precision: bf16`); weights, optimizer,
    embedding and reward head stay as they are."""
    fp8_bf16_layers: int = 1
    """With `fp8`: first and last layers that stay in bf16, so many at each end (`delayed` wants 0)."""
    fp8_param_gather: bool = False
    """With `fp8: tensorwise` or `blockwise`: keep the weights of FP8 layers in FP8 and gather them so after an update,
    which saves the bf16 copy and half of the gather; fp32 weights stay with the optimizer, checkpoints hold bf16."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, core attention, or whole layers."""
    recompute_num_layers: int = 1
    """With `recompute: full`: layers per recomputed block."""
    init_from: str | None = None
    """Checkpoint (run directory or one step of it) whose weights to start from; null: random weights."""
    canonical_reduction: bool = False
    """Add gradients up in one order, whatever the number of data-parallel ranks: runs are then bitwise equal over DP
    sizes. A mode for tests and for hunting bugs: slow, and it needs fp32, no dropout and
    `optimizer.use_distributed_optimizer: false`."""
    gradient_accumulation_fusion: Literal["auto", True, False] = "auto"
    """Add up weight gradients inside the GEMMs that compute them: `auto` where Apex or Transformer Engine's layers can
    (the log says which), `true` refuses to run where neither can; never on the CPU."""


@dataclass(frozen=True)
class OptimizerSection:
    lr: float
    """Peak learning rate."""
    min_lr_fraction: float = 0.1
    """The schedule ends at this fraction of `lr`."""
    warmup_fraction: float = 0.03
    """Share of the steps over which the learning rate rises linearly from 0."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW); not applied to norms, biases and the reward head."""
    adam_beta1: float = 0.9
    """AdamW beta 1."""
    adam_beta2: float = 0.95
    """AdamW beta 2."""
    adam_eps: float = 1e-8
    """AdamW epsilon."""
    clip_grad: float = 1.0
    """Global gradient-norm clip; 0 turns clipping off."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs (needs `overlap_grad_reduce`)."""


@dataclass(frozen=True)
class CheckpointSection:
    save_interval: int = 1000
    """Steps between checkpoints; one more is written at the end."""
    async_save: bool = False
    """Write in the background while training goes on; a checkpoint counts once all of it is on the disk."""
    keep: int = 3
    """Newest checkpoints to keep; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints of every so many steps are never deleted; 0: none is spared."""
    max_failed_saves: int = 3
    """Saves in a row that may fail (a full disk, an I/O error) before the run stops; each failure is a warning."""
    resume: bool = True
    """Continue from the newest complete checkpoint of the run directory; false refuses a directory that has one."""


@dataclass(frozen=True)
class FaultsSection:
    max_consecutive_bad_steps: int = 3
    """Steps in a row that may be skipped (loss or gradient not finite, or a spike) before the run stops."""
    spike_sigmas: float = 0.0
    """Skip a step whose loss or gradient norm lies this many standard deviations above the mean of `spike_window`
    steps; 0 turns it off."""
    spike_window: int = 128
    """Steps over which the mean and standard deviation are taken; nothing is skipped in the first half of them."""
    replica_check_interval: int = 100
    """Steps between comparisons of the weights of data-parallel replicas, also made before every save; 0: never."""
    stall_timeout_seconds: float = 600.0
    """A rank that is not heard of, or a job that makes no progress, for this long ends the job; 0: never."""
    straggler_ratio: float = 1.5
    """A rank that takes this many times as long as the others is reported; 0: never."""


@dataclass(frozen=True)
class EvaluationSection:
    interval: int = 500
    """Steps between evaluations on `data.validation`; 0 turns them off."""
    num_comparisons: int = 512
    """Held-out comparisons per evaluation (the same ones every time)."""


@dataclass(frozen=True)
class LoggingSection:
    interval: int = 10
    """Steps between lines of the console log, `metrics.jsonl` and TensorBoard."""
    tensorboard: bool = True
    """Write TensorBoard event files to `<run.directory>/tensorboard`."""
    hardware_peak_tflops: float | None = None
    """Peak TFLOP/s of one device for MFU; null: looked up by the GPU's name, no MFU where it is unknown."""


@dataclass(frozen=True)
class RunConfig:
    run: RunSection
    model: ModelSection
    data: DataSection
    train: TrainSection
    optimizer: OptimizerSection
    parallel: ParallelSection = field(default_factory=ParallelSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    faults: FaultsSection = field(default_factory=FaultsSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    logging: LoggingSection = field(default_factory=LoggingSection)
