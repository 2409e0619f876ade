"""What it means for a run that an argument differs from its last start.

Every argument is in one of three classes. Safe ones change no result. Others change it from the
checkpoint on, which is said. The rest break the resume where what they lead to (tokens, shapes of
weights, ...) is not what the checkpoint was made with: it then refuses to go on, or does so where
--allow_resume_change names the difference.
"""

from __future__ import annotations

# What is watched, kept and told, and what a start is for.
WATCHED = (
    "leakage_report cache_dir save_steps save_total_limit async_save save_best on_save_error"
    " save_before_timeout resume_from_checkpoint allow_resume_change replica_check_steps"
    " per_device_eval_batch_size eval_metrics sample_prompt sample_validation_prompts sample_steps"
    " sample_max_new_tokens sample_temperature logging_steps report_to experiment_name tracking"
    " tracking_uri sweep log_model register_model log_system_metrics merge_adapter push_to_hub"
    " hub_model_id hub_private_repo trust_remote_code run_name output_dir ddp_timeout"
)
STARTS = "eval_only dry_run dry_run_steps find_batch_size verify_resume from_run show_arguments"
SAFE = frozenset(f"{WATCHED} {STARTS}".split())

# By what is said of them.
CHANGES_RESULT = {
    name: said
    for said, names in {
        "the curve changes from here on": "dropout learning_rate lr_scheduler_type warmup_steps"
        " lr_decay_steps min_lr_ratio weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm"
        " mixed_precision reset_optimizer max_skipped_steps skip_spikes max_rewinds lora_alpha"
        " lora_dropout use_rslora frozen_dtype learning_rate_factors label_smoothing_factor"
        " neftune_noise_alpha",
        "the run may end elsewhere, and a decay up to its end changes from here"
        " on": "max_steps max_train_hours num_train_epochs",
        "the curve changes from here on, by rounding and dropout masks"
        " alone": "attn_implementation per_device_train_batch_size gradient_accumulation_steps tf32"
        " deterministic gradient_checkpointing chunked_loss cpu_fast_path use_liger_kernel"
        " torch_compile torch_compile_scope torch_compile_mode device num_threads",
        "evaluations, the best checkpoint and an early stop change from here on, the curve of"
        " training does not": "validation_sets eval_steps eval_max_batches metric_for_best_model"
        " greater_is_better early_stopping_patience early_stopping_min_delta"
        " early_stopping_min_delta_unit",
    }.items()
    for name in names.split()
}

# By what is held against the checkpoint. The model is never another one; a new optimizer takes
# --reset_optimizer; the others may be named in --allow_resume_change.
BREAKS_RESUME = {
    name: group
    for group, names in {
        "model": "model_name_or_path model_revision model_type config_overrides freeze_parameters"
        " pad_vocab_to_multiple_of lora_rank lora_target_modules lora_modules_to_save use_dora",
        "optimizer": "optim",
        "data": "train_file validation_file exclude_files dataset_name"
        " dataset_config_name dataset_split dataset_validation_split"
        " dataset_revision streaming shuffle_buffer_size train_mixture text_column"
        " messages_column prompt_column completion_column chat_template"
        " document_separator min_document_characters drop_duplicates skip_bad_files"
        " skip_bad_documents validation_split_percentage tokenizer_name vocab_size"
        " bpe_min_frequency special_tokens packing document_mask",
        "block_size": "block_size",
        "global_batch_size": "global_batch_size",
        "seed": "seed",
    }.items()
    for name in names.split()
}


def effect_of_change(name: str) -> str | None:
    """What follows where a run goes on with another value of an argument; None: nothing."""
    if name in BREAKS_RESUME:
        return f"held against the checkpoint's {BREAKS_RESUME[name]}"
    return CHANGES_RESULT.get(name)
