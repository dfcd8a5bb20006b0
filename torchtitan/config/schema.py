"""The tables and keys of a configuration: one pydantic model a table, one docstring a field.

`train.py --help` prints these docstrings, so they are the reference of every key.
"""

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt


def _positive_or_minus_one(value: int) -> int:
    if value == -1 or value > 0:
        return value
    raise ValueError("must be positive, or -1 to have it chosen")


def _inside_the_dump_folder(value: str) -> str:
    path = PurePosixPath(value)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError("must be a relative path that stays inside job.dump_folder")
    return value


PositiveOrAuto = Annotated[int, AfterValidator(_positive_or_minus_one)]
SubFolder = Annotated[str, AfterValidator(_inside_the_dump_folder)]
NonEmpty = Annotated[str, Field(min_length=1)]


class Table(BaseModel):
    """What all tables share: no unknown key, no silent conversion, no nan."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class Job(Table):
    """What the run is called and where it writes."""

    config_file: NonEmpty | None = None
    """The TOML file with the configuration; any key of it can be overridden on the command line."""
    dump_folder: NonEmpty = "./outputs"
    """Folder for everything that the run writes: metrics, TensorBoard, checkpoints, profiles."""
    description: str = ""
    """Free text, logged at start-up and kept with the outputs."""


class Model(Table):
    """Which model to build. A dimension that is not set is the flavour's."""

    name: Literal["llama3"] = "llama3"
    """Architecture."""
    flavor: Literal["debug", "250M", "870M", "2B", "8B"] = "debug"
    """Named set of dimensions; the keys below override single ones."""
    attention: Literal["auto", "fa3", "fa4", "cudnn", "sdpa"] = "auto"
    """Attention kernels. `auto` takes FlashAttention-3 on Hopper and 4 on newer chips where they are installed,
    then cuDNN; on a CPU PyTorch's own. The start-up log says what was taken and why."""
    rope_scaling: Literal["llama3.1", "none"] = "none"
    """Scaling of the rotary frequencies. Weights trained with one are wrong with the other: it is saved with
    every checkpoint and must match on load."""
    dim: PositiveInt | None = None
    """Width of the residual stream."""
    n_layers: PositiveInt | None = None
    """Number of transformer blocks."""
    n_heads: PositiveInt | None = None
    """Number of query heads."""
    n_kv_heads: PositiveInt | None = None
    """Number of key and value heads; divides n_heads."""
    ffn_dim: PositiveInt | None = None
    """Width of the SwiGLU feed-forward layer."""
    rope_theta: PositiveFloat | None = None
    """Base of the rotary frequencies."""
    norm_eps: PositiveFloat | None = None
    """Epsilon of the RMS norms."""


class Optimizer(Table):
    """AdamW and its rates; training.warmup_steps and training.steps shape the schedule."""

    name: Literal["AdamW"] = "AdamW"
    """Optimizer (PyTorch's fused AdamW)."""
    lr: PositiveFloat = 3e-4
    """Peak learning rate, reached at the end of the warm-up."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the running mean of the gradient."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the running mean of the squared gradient."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator of the update."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay, on all parameters."""


class Training(Table):
    """Data, batch, length, precision and parallelism of the run."""

    dataset: Literal["primate", "rodent", "synthetic"] | None = None
    """`primate` and `rodent` are the Neural Piles in the Hugging Face cache, `synthetic` is made on the fly."""
    dataset_path: NonEmpty | None = None
    """Recordings to use instead of a named dataset: a `save_to_disk` folder, or a folder or file of parquet."""
    split: NonEmpty = "train"
    """Split of the dataset to train on."""
    malformed_rows: Literal["skip", "error"] = "skip"
    """Rows that are ragged, empty or lack counts: leave them out with one warning, or refuse the dataset."""
    synthetic_kind: Literal["regular", "poisson"] = "regular"
    """Synthetic recordings: a tenth of the neurons fires once in every bin and the rest never (`regular`),
    or Poisson neurons on shared latent dynamics (`poisson`)."""
    shuffle: bool = True
    """Visit the windows of an epoch in a random order that depends on seed and epoch alone."""
    document_mask: bool = False
    """Keep attention within a recording, where a window spans several. Off: one causal window."""
    num_workers: Annotated[int, Field(ge=0, le=64)] = 1
    """Data loader processes per rank; 0 loads in the training process."""
    vocab_size: Annotated[int, Field(ge=3, le=256)] = 256
    """Number of tokens. The last one is BOS; counts that would reach it are clipped to vocab_size - 2."""
    seq_len: PositiveInt = 2048
    """Tokens a sequence."""
    batch_size: PositiveInt = 1
    """Sequences a rank and forward pass."""
    global_batch_size: PositiveOrAuto = -1
    """Sequences an optimizer step, over all ranks; gradients are accumulated to reach it.
    -1: batch_size times the number of ranks."""
    steps: Annotated[int, Field(gt=0, le=10**9)] = 1000
    """Optimizer steps of the whole run; the learning rate decays linearly to 0 over them."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps of linear learning rate warm-up."""
    stop_after_step: PositiveInt | None = None
    """End this session after that step with a checkpoint, as a time limit would; the same command without it
    goes on. The schedule still spans all `steps`."""
    max_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    max_bad_steps: PositiveInt = 10
    """A step whose loss or gradient is not finite makes no update; after that many of them in a row the run stops."""
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """Make no update from a gradient whose norm is more than that many times the median of the last 128 ones. Unset:
    every finite gradient is used."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the initial weights, the order of the windows and the synthetic data."""
    deterministic: bool = False
    """Deterministic kernels throughout; slower attention on GPUs."""
    compile: bool = False
    """Compile each transformer block with torch.compile."""
    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the forward and backward pass. Weights, optimizer and gradient reduction stay float32."""
    data_parallel_replicate_degree: PositiveInt = 1
    """HSDP: number of groups of ranks that hold a whole copy of the model each."""
    data_parallel_shard_degree: PositiveOrAuto = -1
    """FSDP: number of ranks that a copy is sharded over. -1: all ranks that remain."""
    reshard_after_forward: bool = True
    """FSDP: free a block's gathered weights after its forward pass and gather them again for its backward pass.
    `false` keeps the model's weights gathered, in bf16, which pays where short sequences do not hide the gathers."""
    gc_freq: PositiveInt = 50
    """Python's garbage collector runs every that many steps, and never inside one."""


class Validation(Table):
    """Scoring held-out recordings while training; evaluate.py tells more about a checkpoint."""

    enable: bool = False
    """Score windows of another split every so often, and after the last step. Training goes on as without it, to the
    last bit."""
    interval: PositiveInt = 500
    """Steps between validations."""
    split: NonEmpty = "test"
    """Split of the training data's dataset. Of synthetic data, recordings that no training window is made from."""
    max_windows: PositiveInt = 64
    """Windows of training.seq_len tokens to score, spread evenly over the split and always the same; each process takes
    training.batch_size of them at once, so a multiple of that many in all processes leaves none idle."""


class Metrics(Table):
    """What a step reports, and where."""

    log_freq: PositiveInt = 10
    """Steps between logged steps. Steps in between cost no synchronisation."""
    enable_tensorboard: bool = True
    """Write TensorBoard event files."""
    save_tb_folder: SubFolder = "tb"
    """Folder of the event files, inside job.dump_folder."""


class Checkpoint(Table):
    """Saving, resuming, and starting from other weights."""

    enable_checkpoint: bool = True
    """Save checkpoints, and resume from the newest complete one."""
    folder: SubFolder = "checkpoint"
    """Folder of the checkpoints, inside job.dump_folder."""
    interval: PositiveInt = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_latest_k: Annotated[int, Field(ge=0)] = 0
    """Keep that many newest checkpoints and remove older ones. 0: keep all."""
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """`async` copies the state to host memory and writes it while training goes on; with pinned memory the copy
    from GPUs is faster. The memory, as much as a process's state takes, is kept."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written, a full disk for one: `stop` ends the run, `continue` trains on towards the
    next one. The step is not there then, and the last one must be."""
    verify: Literal["full", "size"] = "full"
    """What is checked when a checkpoint is loaded, beside its manifest: the checksums of all bytes that are read, or
    the sizes of the files alone."""
    fall_back: bool = False
    """Where the newest checkpoint is damaged, set it aside and go on from the one before it. Off: name it and stop."""
    load_step: PositiveOrAuto = -1
    """Step to resume from; it must exist. -1: the newest complete one, or a fresh start where there is none.
    Newer steps are set aside; the same command again goes on from what it has written itself."""
    init_from: NonEmpty | None = None
    """Start from these weights where the run has no checkpoint yet: the folder of a DCP checkpoint, or a
    checkpoint folder, of which the newest step is taken."""
    init_missing_keys: list[NonEmpty] = []
    """Weights that `init_from` may lack and that keep their random initialisation, e.g. `output.weight`; on the
    command line once for each."""
    model_weights_only: bool = False
    """After the last step, also write the weights alone to `export/step-N` in the checkpoint folder."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of that export."""


class ActivationCheckpoint(Table):
    """Which activations the backward pass recomputes."""

    mode: Literal["none", "attention", "full", "auto"] = "none"
    """`full` keeps only each block's input and recomputes the rest; `attention` also keeps each attention's output,
    which is worth its memory at long sequences; `none` keeps everything. `auto` takes what the memory plan
    (`python -m torchtitan.plan`) finds fastest for the GPU's and the host's memory, and sets the three keys below."""
    projections_layers: Annotated[int, Field(ge=0)] = 0
    """Beyond `attention`: that many last blocks also keep their q, k, v and output projections."""
    gate_up_layers: Annotated[int, Field(ge=0)] = 0
    """Beyond `attention`: that many last blocks also keep their feed-forward's gate and up projections."""
    offload_layers: Annotated[int, Field(ge=0)] = 0
    """That many first blocks have what they keep copied to host memory until their backward pass."""
    device_memory_gib: PositiveFloat | None = None
    """For `auto`: GPU memory to plan with, in GiB. Not set: the GPU's, less 6 % for what is not PyTorch's."""
    host_memory_gib: Annotated[float, Field(ge=0)] | None = None
    """For `auto`: host memory that one process may take for offloading, in GiB. Not set: 80 % of what is free,
    shared by the processes of the node."""


class Comm(Table):
    """Timeouts of the collectives."""

    init_timeout_seconds: PositiveInt = 1800
    """Limit for one collective until the first step is done: the first reading of a dataset, loading, compilation."""
    train_timeout_seconds: PositiveInt = 300
    """Limit for a step after the first one: a process that takes longer ends, and leaves its stacks in `hangs` in
    the dump folder."""
    save_timeout_seconds: PositiveInt = 1800
    """Limit for one collective of saving and loading a checkpoint: the slowest rank's disk."""


class Profiling(Table):
    """Traces and memory snapshots."""

    enable_profiling: bool = False
    """Write a Chrome trace of one step, every profile_freq steps."""
    save_traces_folder: SubFolder = "profile_traces"
    """Folder of the traces, inside job.dump_folder."""
    profile_freq: Annotated[int, Field(ge=3)] = 100
    """Steps between traces."""
    enable_memory_snapshot: bool = False
    """Record CUDA's memory history and write it every profile_freq steps and when memory runs out."""
    save_memory_snapshot_folder: SubFolder = "memory_snapshots"
    """Folder of the snapshots, inside job.dump_folder."""


class Float8(Table):
    """Float8 training with torchao, which has to be installed for it."""

    enable_float8_linear: bool = False
    """Compute the blocks' linear layers in float8, with scales taken anew in every step."""
    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    """torchao's recipe: one scale a tensor, which is the fastest; one a row, which is the more exact; or one a row
    with weight gradients in bf16."""


class JobConfig(BaseModel):
    """Everything a run does."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    job: Job = Job()
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    validation: Validation = Validation()
    metrics: Metrics = Metrics()
    checkpoint: Checkpoint = Checkpoint()
    activation_checkpoint: ActivationCheckpoint = ActivationCheckpoint()
    comm: Comm = Comm()
    profiling: Profiling = Profiling()
    float8: Float8 = Float8()
