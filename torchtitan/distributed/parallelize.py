"""From a configuration to a model that is recomputed, compiled, sharded and initialised."""

import hashlib

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from torchtitan.config.schema import JobConfig
from torchtitan.distributed.float8 import convert_linears
from torchtitan.distributed.offload import HostOffload, OffloadedBlock
from torchtitan.distributed.recompute import apply_recompute, kept_by_layer
from torchtitan.models.llama.attention import choose_attention
from torchtitan.models.llama.model import Transformer
from torchtitan.models.llama.shape import ModelShape


def build_model(config: JobConfig, mesh: DeviceMesh, device: torch.device) -> Transformer:
    """The configured model for `device`, sharded, still without memory: `init_weights` gives it that.

    Raises:
        ValueError: where the attention or the float8 layers that were asked for cannot run.
    """
    compute_dtype = getattr(torch, config.training.mixed_precision_param)
    attention = choose_attention(config.model.attention, device, compute_dtype)
    with torch.device("meta"):
        model = Transformer(ModelShape.from_config(config), attention, max_length=config.training.seq_len)
    precision = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.float32,
        # The embedding already gives activations of that precision, and the rotary table must keep its own.
        cast_forward_inputs=False,
    )
    if config.float8.enable_float8_linear:
        convert_linears(model.layers, config.float8, device)
    recompute = config.activation_checkpoint
    offload = HostOffload(device) if recompute.offload_layers else None
    # Each wraps what stands before it, so this is their order.
    for index, kept in enumerate(kept_by_layer(recompute, len(model.layers))):
        block = apply_recompute(model.layers[index], kept)
        if config.training.compile:
            # Without a kernel for packed documents there is a loop over them, which is not compiled.
            block.compile(fullgraph=not config.training.document_mask)
        fully_shard(block, mesh=mesh, mp_policy=precision, reshard_after_forward=config.training.reshard_after_forward)
        if offload is not None:
            block = OffloadedBlock(block, offload, index, parks=index < recompute.offload_layers)
        model.layers[index] = block
    fully_shard(model, mesh=mesh, mp_policy=precision)
    return model


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
