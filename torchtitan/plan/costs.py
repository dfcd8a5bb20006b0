"""Memory and time of a training step, by their causes.

FLOPs are counted as in `torchtitan.flops`; bytes are those of the tensors named in the code. What can only be
measured, the allocator's slack and the temporaries of a compiled backward pass, is a multiple of the feed-forward
activation, fitted to the results in `benchmarks/results/`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torchtitan.config.schema import ActivationCheckpoint, JobConfig
from torchtitan.distributed.degrees import Degrees
from torchtitan.models.llama.shape import ModelShape
from torchtitan.plan.hardware import GPU

GIB = 2**30
STATE_BYTES = 16
"""A parameter's fp32 weight, gradient and two moments."""
BACKWARD_TEMPORARIES = 6.75
"""Feed-forward activations that a block needs in its backward pass, the allocator's slack included."""
KEPT_TEMPORARIES = 2.4
"""How many fewer they are where gate and up were kept."""
FORWARD_SHARE = 0.28
"""Of a block's time, its forward pass, by the kernel sums; the way back has the longer backward pass to hide in."""
EAGER_FACTOR = 2.0
"""How much more an uncompiled block keeps and needs: a guess on the safe side, for no result is of such a model."""
HALF_RATE_LENGTH = 1500
"""Tokens at which attention reaches half its rate on long sequences."""
NARROW_HEADS = 0.9
"""Of that rate, with heads narrower than 128: fitted to one run of `250M`."""


@dataclass(frozen=True)
class Step:
    """What there is to do on each GPU.

    Attributes:
        shape: of the model.
        tokens: of a forward pass.
        lengths: of the documents that these are, in tokens.
        passes: forward and backward passes of a step.
        shards, replicas: GPUs that a copy of the model is sharded over, and copies.
        gpus_per_node: of them, in one node.
        compute_bytes: of an activation: 2, or 4 in fp32.
        float8, compiled, reshard: as configured.
    """

    shape: ModelShape
    tokens: int
    lengths: tuple[int, ...]
    passes: int
    shards: int
    replicas: int
    gpus_per_node: int
    compute_bytes: int
    float8: bool
    compiled: bool
    reshard: bool

    @classmethod
    def of(
        cls, config: JobConfig, degrees: Degrees, gpus_per_node: int, lengths: Sequence[int] | None = None
    ) -> "Step":
        """A configuration's step. `lengths` of the documents in a sequence; None: each sequence is one."""
        training = config.training
        return cls(
            shape=ModelShape.from_config(config),
            tokens=training.batch_size * training.seq_len,
            lengths=tuple(lengths or [training.seq_len]) * training.batch_size,
            passes=degrees.accumulation_steps,
            shards=degrees.shard,
            replicas=degrees.replicate,
            gpus_per_node=gpus_per_node,
            compute_bytes=2 if training.mixed_precision_param == "bfloat16" else 4,
            float8=config.float8.enable_float8_linear,
            compiled=training.compile,
            reshard=training.reshard_after_forward,
        )

    @property
    def block_params(self) -> int:
        """Parameters of one block."""
        outside = 2 * self.shape.vocab_size * self.shape.dim + self.shape.dim
        return (self.shape.num_params - outside) // self.shape.n_layers


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one GPU, and of host memory for it, by cause."""

    states: float
    gathered: float
    kept: float
    temporaries: float
    host: float

    @property
    def device(self) -> float:
        return self.states + self.gathered + self.kept + self.temporaries


@dataclass(frozen=True)
class Time:
    """Seconds of one step by cause; `exposed` is what communication and copies add to the computing."""

    products: float
    attention: float
    recompute: float
    elementwise: float
    optimizer: float
    exposed: float

    @property
    def total(self) -> float:
        return self.products + self.attention + self.recompute + self.elementwise + self.optimizer + self.exposed


def block_activations(step: Step) -> dict[str, int]:
    """Bytes of what one block can keep, by the names of `torchtitan.distributed.recompute`."""
    shape = step.shape
    kv_dim = shape.n_kv_heads * shape.head_dim
    per_token = {
        "input": shape.dim * step.compute_bytes,
        "attention": shape.dim * step.compute_bytes + shape.n_heads * 4,
        "projections": 2 * (shape.dim + kv_dim) * step.compute_bytes,
        "gate_up": 2 * shape.ffn_dim * step.compute_bytes,
        # What goes into w2; in float8 its quantised copy takes the place of others.
        "everything": 0 if step.float8 else shape.ffn_dim * step.compute_bytes,
    }
    slack = 1.0 if step.compiled else EAGER_FACTOR
    return {name: int(size * step.tokens * slack) for name, size in per_token.items()}


def layers_keeping(recompute: ActivationCheckpoint, n_layers: int) -> dict[str, int]:
    """How many last blocks keep each."""
    everything = recompute.mode == "none"
    return {
        "input": n_layers,
        "attention": 0 if recompute.mode == "full" else n_layers,
        "projections": n_layers if everything else recompute.projections_layers,
        "gate_up": n_layers if everything else recompute.gate_up_layers,
        "everything": n_layers if everything else 0,
    }


def memory(step: Step, recompute: ActivationCheckpoint) -> Memory:
    """Peak memory with this recomputation.

    The backward pass is followed from the last block to the first: each finds the activations of the blocks below it
    that stayed on the device, its own, and those that are fetched for the next one.
    """
    shape, n = step.shape, step.shape.n_layers
    size, layers = block_activations(step), layers_keeping(recompute, n)
    parked = min(recompute.offload_layers, n)
    block = [sum(size[name] for name in size if i >= n - layers[name]) for i in range(n)]
    slack = 1.0 if step.compiled else EAGER_FACTOR
    feed_forward = step.tokens * shape.ffn_dim * step.compute_bytes * slack

    kept, temporaries, resident = 0, 0.0, sum(block[parked:])
    for i in reversed(range(n)):
        here = resident + (block[i] if i < parked else 0) + (block[i - 1] if 0 < i <= parked else 0)
        needed = BACKWARD_TEMPORARIES - (KEPT_TEMPORARIES if i >= n - layers["gate_up"] else 0)
        if here + needed * feed_forward > kept + temporaries:
            kept, temporaries = here, needed * feed_forward
        resident -= block[i] if i >= parked else 0

    # Weights of the block at work and of the next one, its gradient, and the last one's, twice, in fp32 on its way.
    gathered = (8 + 3 * step.compute_bytes) * step.block_params
    if not step.reshard:
        gathered += step.compute_bytes * (shape.num_params - 2 * step.block_params)
    rope = step.tokens * shape.head_dim * 4
    logits = step.tokens * shape.vocab_size * (2 * step.compute_bytes + 3 * 4)
    return Memory(
        states=STATE_BYTES * shape.num_params / step.shards,
        gathered=gathered,
        kept=kept + rope,
        temporaries=max(temporaries, logits),
        host=sum(block[:parked]),
    )


def time(step: Step, recompute: ActivationCheckpoint, gpu: GPU) -> Time:
    """Expected time of a step with this recomputation on this GPU."""
    shape, tokens, n = step.shape, step.tokens, step.shape.n_layers
    in_float32 = step.compute_bytes == 4
    product_rate = gpu.products_float8 if step.float8 else gpu.products
    rate = gpu.float32 if in_float32 else product_rate
    layers = layers_keeping(recompute, n)
    q_o, k_v = 2 * shape.dim**2, 2 * shape.dim * shape.n_kv_heads * shape.head_dim
    gate_up, down = 2 * shape.dim * shape.ffn_dim, shape.dim * shape.ffn_dim

    def products(params: float) -> float:
        return 2 * params * tokens / rate

    def attention(flops_per_pair: int, rate: float) -> float:
        if in_float32:
            rate = gpu.float32
        elif shape.head_dim < 128:
            rate *= NARROW_HEADS
        return sum(
            flops_per_pair * shape.dim * length**2 / 2 / (rate * length / (length + HALF_RATE_LENGTH))
            for length in step.lengths
        )

    def elementwise(widths: float, ffn_widths: float) -> float:
        return tokens * step.compute_bytes * (widths * shape.dim + ffn_widths * shape.ffn_dim) / gpu.memory_bandwidth

    forward, backward = attention(4, gpu.attention_forward), attention(10, gpu.attention_backward)
    again = 0.0
    if recompute.mode != "none":
        again += (n - layers["attention"]) * forward
        again += (n - layers["projections"]) * products(q_o + k_v)
        again += (n - layers["gate_up"]) * (products(gate_up))
        again += n * elementwise(7, 3)
    output = 3 * products(shape.vocab_size * shape.dim)
    computing = n * (3 * products(q_o + k_v + gate_up + down) + forward + backward + elementwise(19, 8)) + again
    return Time(
        products=step.passes * (n * 3 * products(q_o + k_v + gate_up + down) + output),
        attention=step.passes * n * (forward + backward),
        recompute=step.passes * again,
        elementwise=step.passes * n * elementwise(19, 8),
        optimizer=32 * shape.num_params / step.shards / gpu.memory_bandwidth,
        exposed=step.passes * max(0.0, _communication(step, gpu) - computing, _copies(step, recompute, gpu, computing)),
    )


def communication_bytes(step: Step) -> tuple[float, float]:
    """Bytes that a GPU sends for one pass: among the shards of a copy of the model, and among its replicas."""
    gathers = 2 if step.reshard else 1
    within = step.shape.num_params * (step.shards - 1) / step.shards * (gathers * step.compute_bytes + 4)
    # The replicas of a shard add up their gradients: a reduce-scatter and an all-gather of it.
    return within, 2 * 4 * step.shape.num_params / step.shards * (step.replicas - 1) / step.replicas


def _communication(step: Step, gpu: GPU) -> float:
    within, among = communication_bytes(step)
    # Rings through several nodes run over the network cards of all their GPUs.
    across = min(gpu.link_bandwidth, min(step.shards, step.gpus_per_node) * gpu.network_bandwidth)
    seconds = within / (across if step.shards > step.gpus_per_node else gpu.link_bandwidth)
    beyond = step.shards * step.replicas > step.gpus_per_node
    return seconds + among / (gpu.network_bandwidth if beyond else gpu.link_bandwidth)


def _copies(step: Step, recompute: ActivationCheckpoint, gpu: GPU, computing: float) -> float:
    """What the copies to the host take longer than the forward passes of their blocks."""
    copied = memory(step, recompute).host / gpu.host_bandwidth
    if not copied:
        return 0.0
    return max(0.0, copied - FORWARD_SHARE * computing * recompute.offload_layers / step.shape.n_layers)
