"""Keys that earlier configurations carried and that have no meaning here, each with the reason and the remedy."""

RETIRED_KEYS = {
    "tensor_parallel_degree": "the model is sharded with FSDP alone; remove the key",
    "enable_async_tensor_parallel": "the model is sharded with FSDP alone; remove the key",
    "enable_loss_parallel": "the model is sharded with FSDP alone; remove the key",
    "pipeline_parallel_degree": "the model is sharded with FSDP alone; remove the key",
    "pipeline_parallel_split_points": "the model is sharded with FSDP alone; remove the key",
    "pipeline_parallel_schedule": "the model is sharded with FSDP alone; remove the key",
    "context_parallel_degree": "the model is sharded with FSDP alone; remove the key",
    "norm_type": "the norm is always RMSNorm; remove the key",
    "selective_ac_option": "there is no per-layer selection; set activation_checkpoint.mode and remove the key",
    "interval_type": "checkpoint.interval always counts steps; remove the key",
    "tokenizer_path": "tokens are spike counts, there is no tokenizer; remove the key",
    "create_seed_checkpoint": "initial weights do not depend on the number of ranks; remove the key",
    "use_for_integration_test": "it had no effect on a run; remove the key",
    "print_args": "the resolved configuration is always written to the dump folder; remove the key",
    "fused": "AdamW is always fused; remove the key",
    "mixed_precision_reduce": "gradients are always reduced in float32; remove the key",
    "enable_fsdp_float8_all_gather": "weights are gathered in bf16, hidden behind computing; remove the key",
    "precompute_float8_dynamic_scale_for_fsdp": "weights are gathered in bf16, hidden behind computing; remove the key",
    "scale_for_fsdp": "weights are gathered in bf16, hidden behind computing; remove the key",
    "trace_buf_size": "set the environment variable TORCH_NCCL_TRACE_BUFFER_SIZE instead; remove the key",
}
