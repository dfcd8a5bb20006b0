"""From a model on the meta device to one that is recomputed, compiled, sharded and initialised."""

import hashlib

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from torchtitan.config.schema import JobConfig
from torchtitan.models.llama.model import Transformer


def parallelize(model: Transformer, mesh: DeviceMesh, config: JobConfig) -> None:
    """Applies recomputation, compilation and sharding, in place and in this order: each wraps the one before."""
    for index, block in enumerate(model.layers):
        if config.activation_checkpoint.mode == "full":
            # Nothing in the model is random, so there is no random state to restore.
            block = checkpoint_wrapper(block, preserve_rng_state=False)
            model.layers[index] = block
        if config.training.compile:
            block.compile(fullgraph=not config.training.document_mask or mesh.device_type == "cuda")
    precision = MixedPrecisionPolicy(
        param_dtype=getattr(torch, config.training.mixed_precision_param),
        reduce_dtype=torch.float32,
        # The embedding already gives activations of that precision, and the rotary table must keep its own.
        cast_forward_inputs=False,
    )
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)


def init_weights(model: Transformer, device: torch.device, seed: int) -> None:
    """Allocates the sharded model's weights and buffers on `device` and gives them their initial values.

    Each weight has a random stream of its own, drawn whole on every rank, which keeps its shard: the values do not
    depend on the number of ranks.
    """
    model.to_empty(device=device)
    model.init_buffers()
    generator = torch.Generator(device)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        name = name.replace("_checkpoint_wrapped_module.", "")
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "little"))
        with torch.no_grad():
            whole = torch.empty(parameter.shape, device=device)
            model.init_parameter(name, whole, generator)
            # Without a source rank each rank cuts its shard out of its own copy: nothing is sent.
            parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None))
