"""Keys of LLaMA-Factory and transformers that no argument here stands for, and why; with the values that ask for none.

IGNORED change no number of a training: they are passed over in silence. The reasons of NO_EQUIVALENT end a sentence
that begins with the key.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Keys:
    """Keys with one reason. `names` are divided by blanks; "a=x|y" asks for nothing where its value is x or y, as all
    do that are null, false or empty.
    """

    reason: str
    names: str

    def each(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield the keys with the values that ask for nothing."""
        for word in self.names.split():
            name, _, rest = word.partition("=")
            yield name, tuple(rest.split("|")) if rest else ()


IGNORED = Keys("no number of a training depends on them", """
    accelerator_config account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split adapter_folder
    apply_rope_fusion average_tokens_across_devices bf16_full_eval bias_activation_fusion buffer_size cache_dir
    calculate_per_token_loss cross_entropy_loss_fusion data_shared_file_system dataloader_in_order
    dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
    dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters
    ddp_static_graph ddp_timeout debug disable_tqdm do_train enable_liger_kernel eval_accumulation_steps
    eval_do_concat_batches eval_use_gather_object export_hf_on_finish flash_attn fp16_full_eval
    fp8_backend fp8_enable_fsdp_float8_all_gather full_determinism gradient_checkpointing_kwargs hf_hub_token hub_token
    ignore_pad_token_for_loss include_effective_tokens_per_second include_num_input_tokens_seen
    include_tokens_per_second infer_backend infer_dtype kt_cpu_activation liger_kernel_config local_rank log_level
    log_level_replica log_on_each_node logging_dir logging_first_step logging_nan_inf_filter logging_strategy
    low_cpu_mem_usage masked_softmax_fusion mixed_precision moe_grouped_gemm ms_hub_token offload_folder om_hub_token
    overlap_grad_reduce overlap_param_gather overwrite_cache per_device_eval_batch_size prediction_loss_only
    preprocessing_batch_size print_param_status ray_init_kwargs ray_num_workers ray_run_name ray_storage_path
    ray_scheduler remove_unused_columns resources_per_worker master_addr master_port save_on_each_node save_safetensors
    skip_memory_metrics streaming tf32 torch_compile_backend torch_compile_mode torch_empty_cache_steps
    trust_remote_code upcast_layernorm upcast_lmhead_output use_cache use_cpu use_distributed_optimizer
    use_fast_tokenizer use_hyper_parallel use_kt use_kv_cache use_legacy_prediction_loop use_liger_kernel use_mca
    use_megatron_bridge use_reentrant_gc use_unsloth use_unsloth_gc use_v1_kernels recompute_method recompute_num_layers
    activation_checkpointing activation_checkpointing_kwargs enable_jit_checkpoint fsdp_min_num_params
    fsdp_transformer_layer_cls_to_wrap kt_config label_names length_column_name restore_callback_states_from_checkpoint
    block_diag_attn compute_dtype device_map model_max_length quantization_device_map
""")

NO_EQUIVALENT = (
    Keys("adapters are A and B of linear layers, begun as PEFT begins them", """
        additional_target init_lora_weights loraplus_lr_embedding=1e-06 pissa_convert pissa_init pissa_iter=16 use_dora
        kt_expert_checkpoint_path kt_lora_expert_intermediate_size kt_lora_expert_num kt_use_lora_experts
    """),
    Keys("weights are read from --load", "kt_non_expert_weight_path kt_weight_path megatron_pretrained_checkpoint"),
    Keys("the vocabulary is the model's", """
        add_special_tokens add_tokens init_special_tokens=noise_init new_special_tokens_config resize_vocab
        split_special_tokens
    """),
    Keys("give --rope-type, --rotary-scaling-factor and --original-max-position-embeddings", "rope_scaling"),
    Keys("attention and layers are the model's own", "mixture_of_depths shift_attn use_llama_pro"),
    Keys("all rows are read; cut the files (head -n)", "max_samples"),
    Keys("loss is on what the assistant says, in all turns; --split-turns reasoning has answers with thoughts alone",
         "mask_history train_on_prompt"),
    Keys("the template has none; put a system message into the data", "default_system"),
    Keys("tools are written as the template has them", "tool_format"),
    Keys("images, video and sound are not read", """
        freeze_language_model freeze_multi_modal_projector=true freeze_vision_tower=true media_dir image_max_pixels
        image_min_pixels video_max_pixels video_min_pixels video_fps video_maxlen use_audio_in_video
        crop_to_patches image_do_pan_and_scan audio_sampling_rate
    """),
    Keys("a last batch that is not full is filled up with blank rows", "dataloader_drop_last"),
    Keys("samples are shuffled, by --seed", """
        data_seed disable_shuffling group_by_length ignore_data_skip train_sampling_strategy=random
    """),
    Keys("the loss is cross-entropy over tokens", """
        asft_alpha=0.1 eaft_alpha=1.0 label_smoothing_factor=0|0.0 use_asft_loss use_dft_loss
        use_eaft_loss
    """),
    Keys("the optimizer is AdamW", """
        apollo_layerwise apollo_proj=random apollo_proj_type=std apollo_rank=16 apollo_scale=32.0
        apollo_scale_front apollo_scale_type=channel apollo_target=all apollo_update_interval=200 badam_mask_mode
        badam_mode=layer badam_start_block badam_switch_interval badam_switch_mode badam_update_ratio badam_verbose
        galore_layerwise galore_proj_type=std galore_rank=16 galore_scale=2.0 galore_target=all
        galore_update_interval=200 optim_args optim_target_modules use_adam_mini use_apollo use_badam use_galore
        use_muon
    """),
    Keys("the run trains to its end, and the last checkpoint is the result", """
        early_stopping_steps greater_is_better load_best_model_at_end metric_for_best_model
    """),
    Keys("what is reported of held-out files is in docs/finetuning.md", """
        batch_eval_metrics compute_accuracy eval_delay=0 eval_on_start include_for_metrics predict_with_generate
    """),
    Keys("batches are what they are asked to be", "auto_find_batch_size"),
    Keys("nothing is sent to a hub", """
        hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy=every_save push_to_hub
        trackio_bucket_id trackio_space_id trackio_static_space_id
    """),
    Keys("metrics.jsonl, TensorBoard and Weights & Biases are written", """
        swanlab_api_key swanlab_lark_secret swanlab_lark_webhook_url swanlab_logdir swanlab_mode=cloud
        swanlab_project=llamafactory swanlab_run_name swanlab_workspace use_swanlab
    """),
    Keys("--profile writes a trace", """
        enable_torch_profiler profile_modules profiler_active_steps=1 profiler_output_dir profiler_profile_memory=true
        profiler_record_shapes=true profiler_repeat=1 profiler_wait_steps=1 profiler_warmup_steps=1
        profiler_with_stack=true
    """),
    Keys("the layout is that of Megatron's arguments (docs/parallelism.md)", """
        extra_config hyper_parallel_args hyper_parallel_cp_size=1 megatron_bridge_args parallelism_config
        use_packed_sequences
    """),
    Keys("it is for preference tuning and reinforcement learning", """
        dpo_label_smoothing=0.0 kto_chosen_weight=1.0 kto_rejected_weight=1.0 ld_alpha pref_bco_weight=0.0
        pref_beta=0.1 pref_ftx=0.0 pref_loss=sigmoid ref_model ref_model_adapters ref_model_quantization_bit
        reward_model reward_model_adapters reward_model_quantization_bit reward_model_type=lora simpo_gamma=0.5
    """),
    Keys("it is for answering: tools/generate.py and tools/chat.py", """
        do_predict do_sample length_penalty max_length max_new_tokens num_beams repetition_penalty
        skip_special_tokens=true temperature top_k top_p eval_num_beams vllm_maxlen vllm_gpu_util vllm_enforce_eager
        vllm_max_lora_rank vllm_config sglang_config sglang_maxlen sglang_mem_fraction sglang_tp_size
        sglang_lora_backend
    """),
    Keys("tools/merge_lora.py and --save-hf write models", """
        export_device export_dir export_hub_model_id export_legacy_format export_quantization_bit
        export_quantization_dataset export_quantization_maxlen export_quantization_nsamples export_size
    """),
    Keys("there are no layers or modules to name: give --freeze-parameters", """
        freeze_extra_modules freeze_trainable_layers=2 freeze_trainable_modules=all
    """),
    Keys("OFT is not there", "module_dropout=0.0 oft_block_size=32 oft_rank=0 oft_target=all"),
)
