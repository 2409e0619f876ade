"""Sets of arguments with one mistake each, and words of the problem that each must give."""

from __future__ import annotations

from typing import Any

LOADED = {"model_type": None, "model_name_or_path": "gpt2"}  # a loaded model in place of a new one
FLAG = "(command line)"
PRODUCT_OF_8 = "per_device_train_batch_size=4 x gradient_accumulation_steps=2 x processes=1 = 8"

CODE = {"train_file": "${PYTHON_STDLIB}", "weight": 3}
CHAT = {"tokenizer_name": "gpt2", "messages_column": "messages"}

TEXTS = {"validation_file": "${PYTHON_STDLIB}"}
ERRORS = {"early_stopping_min_delta": 2, "early_stopping_min_delta_unit": "standard_errors"}

# Mistakes in how the model is judged.
BAD_EVALUATIONS: list[tuple[dict[str, Any], list[str]]] = [
    ({"validation_sets": {"math": "math.txt"}}, ['math takes an object like {"validation_file"']),
    ({"validation_sets": {"math": {"train_file": "a"}}}, ["math cannot set train_file"]),
    ({"validation_sets": {"math": TEXTS | {"weight": 2}}}, ["math cannot set weight"]),
    ({"validation_sets": {"math": {"validation_file": 3}}}, ["math, validation_file takes text"]),
    ({"validation_sets": {"math": {}}}, ["validation_sets, math: no data", "validation_file"]),
    (
        {"validation_sets": {"math": {"validation_file": "no math"}}},
        ["validation_file=no math does not exist"],
    ),
    (
        {"validation_sets": {"math": TEXTS | {"dataset_name": "a/b"}}},
        ["validation_sets, math: validation_file and dataset_name exclude each other"],
    ),
    (
        {"validation_sets": {"math": TEXTS | {"dataset_revision": "main"}}},
        ["validation_sets, math: dataset_revision", "no effect without dataset_name"],
    ),
    (
        {"validation_sets": {"math": TEXTS | {"prompt_column": "a"}}, "tokenizer_name": "gpt2"},
        ["validation_sets, math: prompt_column=a needs completion_column"],
    ),
    (
        {"validation_sets": {"math": TEXTS | {"messages_column": "a"}}, "tokenizer_name": "char"},
        ["tokenizer_name=char has no chat template"],
    ),
    (
        {
            "train_file": None,
            "dataset_name": "a/b",
            "validation_sets": {"math": {"text_column": "a"}},
        },
        ["validation_sets, math: no data of its own", "dataset_validation_split"],
    ),
    (
        {
            "train_file": None,
            "dataset_name": "a/b",
            "streaming": True,
            "max_steps": 9,
            "eval_steps": None,
            "validation_sets": {"math": {"dataset_validation_split": "test"}},
        },
        ["validation_sets, math: streaming=true reads no further split", "validation_file"],
    ),
    ({"validation_sets": {"my math": TEXTS}}, ['"my math" cannot name a set', "letters"]),
    ({"validation_sets": {"perplexity": TEXTS}}, ["perplexity is the name of a metric"]),
    (
        {
            "train_file": None,
            "train_mixture": {"code": CODE},
            "validation_sets": {"code": TEXTS},
        },
        ["validation_sets: code is a source of train_mixture"],
    ),
    (
        {"train_file": None, "train_mixture": {"c(++)": CODE}},
        ['train_mixture: "c(++)" would stand in the names of metrics'],
    ),
    ({"metric_for_best_model": "loss"}, ["=loss is no metric of an evaluation", "eval/loss"]),
    ({"metric_for_best_model": "eval/math/loss"}, ["no set", "name math; there is none"]),
    (
        {"metric_for_best_model": "eval/law/loss", "validation_sets": {"math": TEXTS}},
        ["no set", "name law; there are math"],
    ),
    (
        {"metric_for_best_model": "eval/perplexity", "eval_metrics": []},
        ["eval/perplexity is not computed: add perplexity to eval_metrics"],
    ),
    (
        {"metric_for_best_model": "eval/bleu"},
        ["eval/bleu is not computed: use one of these; there are loss, perplexity"],
    ),
    ({"metric_for_best_model": "eval/loss_stderr"}, ["eval/loss_stderr is not computed"]),
    ({"eval_metrics": ["token_acuracy"]}, ["token_acuracy: did you mean token_accuracy?"]),
    ({"eval_metrics": ["a/metric.py"]}, ["eval_metrics=a/metric.py does not exist"]),
    ({"early_stopping_min_delta": -1}, ["early_stopping_min_delta=-1.0", "0 or more"]),
    (ERRORS, ["=standard_errors has no effect without early_stopping_patience"]),
    ({"sample_steps": 5}, ["sample_steps=5 has nothing to continue"]),
    (
        {"sample_validation_prompts": 2, "eval_steps": None},
        ["sample_validation_prompts=2 needs validation data"],
    ),
    (
        ERRORS | {"early_stopping_patience": 1, "early_stopping_min_delta": 0},
        ["early_stopping_min_delta=0 asks for no difference at all", "such as 2"],
    ),
    (
        ERRORS | {"early_stopping_patience": 1, "metric_for_best_model": "eval/token_accuracy"},
        ["is for a loss", "metric_for_best_model=eval/token_accuracy"],
    ),
    (
        ERRORS
        | {
            "early_stopping_patience": 1,
            "train_file": None,
            "train_mixture": {"code": CODE},
            "metric_for_best_model": "eval/code/loss",
        },
        ["is not known of a source", "validation_sets too"],
    ),
]

# Mistakes in what the data is, on top of a good file.
BAD_DATA: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"train_mixture": {"code": CODE}},
        ["train_mixture and train_file", "exclude each other", "drop the first"],
    ),
    (
        {"train_file": None, "train_mixture": {"code": 3}},
        ["train_mixture (good.json line 1)", 'code takes an object like {"train_file"', "not 3"],
    ),
    (
        {"train_file": None, "train_mixture": {"code": CODE | {"train_files": "x"}}},
        ["code cannot set train_files", "did you mean train_file?"],
    ),
    (
        {"train_file": None, "train_mixture": {"code": CODE | {"block_size": 8}}},
        ["code cannot set block_size"],
    ),
    (
        {"train_file": None, "train_mixture": {"code": CODE | {"weight": "3"}}},
        ["code, weight takes number", "without quotes"],
    ),
    (
        {"train_file": None, "train_mixture": {"code": {"weight": 1}}},
        ["train_mixture, source code: no data", "train_file"],
    ),
    (
        {"train_file": None, "train_mixture": {"code": {"train_file": "nowhere"}}},
        ["train_file=nowhere does not exist"],
    ),
    ({"dataset_revision": "main"}, ["dataset_revision", "no effect without dataset_name"]),
    ({"dataset_split": "test"}, ["dataset_split", "no effect without dataset_name"]),
    ({"prompt_column": "question"} | CHAT | {"messages_column": None}, ["needs completion_column"]),
    ({"completion_column": "a"} | CHAT | {"messages_column": None}, ["needs prompt_column"]),
    (
        CHAT | {"prompt_column": "a", "completion_column": "b"},
        ["messages_column=messages and prompt_column=a exclude each other"],
    ),
    (CHAT | {"tokenizer_name": "bpe"}, ["tokenizer_name=bpe", "no chat template"]),
    ({"chat_template": "{{ messages }}"}, ["chat_template", "no effect on text"]),
    ({"special_tokens": ["<a>", " "]}, ['special_tokens=["<a>", " "] holds an empty text']),
    (
        {
            "train_file": None,
            "dataset_name": "a/b",
            "streaming": True,
            "max_steps": 9,
            "eval_steps": None,
            "max_rewinds": 1,
        },
        ["max_rewinds=1 with streaming=true", "a stream cannot go back"],
    ),
    ({"shuffle_buffer_size": 7}, ["shuffle_buffer_size=7", "no effect without streaming"]),
    (
        {"train_file": None, "dataset_name": "a/b", "streaming": True, "eval_steps": None},
        ["streaming=true needs max_steps"],
    ),
    ({"streaming": True, "max_steps": 9}, ["streaming=true", "no effect without dataset_name"]),
    (
        {
            "train_file": None,
            "dataset_name": "a/b",
            "streaming": True,
            "max_steps": 9,
            "eval_steps": None,
        }
        | {"tokenizer_name": "bpe"},
        ["tokenizer_name=bpe", "streaming=true never holds"],
    ),
    (
        {
            "train_file": None,
            "dataset_name": "a/b",
            "streaming": True,
            "max_steps": 9,
            "eval_steps": None,
        }
        | {"drop_duplicates": True},
        ["drop_duplicates=true and streaming=true exclude each other"],
    ),
    (
        {"train_file": None, "dataset_name": "a/b", "streaming": True, "max_steps": 9},
        ["eval_steps with streaming=true needs eval_max_batches"],
    ),
    ({"min_document_characters": -1}, ["min_document_characters=-1", "0 or more"]),
    ({"packing": "best"}, ["packing", "stream|best_fit"]),
    ({"allow_resume_change": ["model"]}, ["allow_resume_change", "data|block_size"]),
]

# Changes to a good file, and what the one problem must say.
BAD_SETTINGS: list[tuple[dict[str, Any], list[str]]] = [
    # names
    ({"learnig_rate": 0.1}, ["learnig_rate (good.json line 1)", "did you mean learning_rate"]),
    ({"learning-rate": 0.1}, ["learning-rate (good.json line 1)", "did you mean learning_rate"]),
    ({"#comment": "x"}, ["#comment (good.json line 1)", "no such argument", "--help"]),
    # types
    ({"learning_rate": "3e-4"}, ["learning_rate (good.json line 1)", '"3e-4"', "without quotes"]),
    ({"learning_rate": True}, ["learning_rate", "takes number, not true"]),
    ({"learning_rate": None}, ["learning_rate", "takes number, not null"]),
    ({"learning_rate": float("nan")}, ["learning_rate", "not NaN"]),
    ({"learning_rate": float("inf")}, ["learning_rate", "not Infinity"]),
    ({"learning_rate": 10**400}, ["learning_rate", "takes number, not 1000"]),
    ({"learning_rate": [0.1]}, ["learning_rate", "takes number, not [0.1]"]),
    ({"max_steps": 100.0}, ["max_steps", "takes integer|null, not 100.0", "write 100"]),
    ({"max_steps": 1.5}, ["max_steps", "takes integer|null, not 1.5"]),
    ({"max_steps": True}, ["max_steps", "takes integer|null, not true"]),
    ({"max_steps": "100"}, ["max_steps", "without quotes"]),
    ({"warmup_steps": None}, ["warmup_steps", "takes integer, not null"]),
    ({"save_best": 1}, ["save_best", "takes true|false, not 1"]),
    ({"save_best": "true"}, ["save_best", "takes true|false", "without quotes"]),
    ({"run_name": 7}, ["run_name", "takes text|null, not 7", "in quotes"]),
    ({"run_name": ""}, ["run_name", 'not ""', "leave the argument out"]),
    ({"train_file": 7}, ["train_file", "takes text ..., not 7"]),
    ({"train_file": ["${PYTHON_STDLIB}", 7]}, ["train_file", "not 7"]),
    ({"train_file": [""]}, ["train_file", 'not ""']),
    ({"config_overrides": [1]}, ["config_overrides", "object", "[1]"]),
    ({"config_overrides": {"n_layer": float("nan")}}, ["config_overrides", "NaN"]),
    # choices
    ({"lr_scheduler_type": "cosin"}, ["linear|cosine|constant", "did you mean cosine?"]),
    ({"device": "tpu"}, ["device", "auto|cpu|cuda|mps", '"tpu"']),
    ({"report_to": ["mlflow", "tensorbord"]}, ["report_to", "did you mean tensorboard?"]),
    # the environment
    ({"cache_dir": "${NOT_SET}/x"}, ["cache_dir", "${NOT_SET}/x", "set NOT_SET"]),
    # ranges
    (
        {"learning_rate": 0},
        ["learning_rate=0.0", "more than 0", "(learning_rate: good.json line 1)"],
    ),
    ({"min_lr_ratio": 1.1}, ["min_lr_ratio=1.1", "from 0 to 1"]),
    ({"dropout": 1}, ["dropout=1.0", "less than 1, or null"]),
    ({"adam_beta1": 1.0}, ["adam_beta1=1.0", "less than 1"]),
    ({"adam_beta2": -0.1}, ["adam_beta2=-0.1", "at least 0"]),
    ({"adam_epsilon": 0}, ["adam_epsilon=0.0", "more than 0"]),
    ({"weight_decay": -0.1}, ["weight_decay=-0.1", "0 or more"]),
    ({"max_grad_norm": 0}, ["max_grad_norm=0.0", "more than 0, or null"]),
    ({"max_steps": 0}, ["max_steps=0", "1 or more, or null"]),
    ({"num_train_epochs": 0}, ["num_train_epochs=0.0", "more than 0"]),
    ({"block_size": 1}, ["block_size=1", "2 or more, or null"]),
    ({"vocab_size": 256}, ["vocab_size=256", "257 or more"]),
    ({"validation_split_percentage": 51}, ["validation_split_percentage=51.0", "from 0 to 50"]),
    ({"seed": 2**32}, ["seed=4294967296", "from 0 to 4294967295"]),
    ({"logging_steps": 0}, ["logging_steps=0", "1 or more"]),
    ({"ddp_timeout": 0}, ["ddp_timeout=0", "1 or more"]),
    # model, data and tokenizer
    ({"model_type": None}, ["no model", "model_name_or_path", "model_type"]),
    ({"model_name_or_path": "gpt2"}, ["model_name_or_path=gpt2 and model_type=gpt2", "exclude"]),
    ({**LOADED, "config_overrides": {"n_layer": 2}}, ["config_overrides", "exclude each other"]),
    ({"model_revision": "main"}, ["model_revision=main has no effect with model_type=gpt2"]),
    (
        LOADED | {"model_name_or_path": ".", "model_revision": "v1"},
        ["model_revision=v1 has no effect on a local folder (.): drop it"],
    ),
    ({"lora_rank": 4}, ["lora_rank=4 and model_type=gpt2", "beside weights that exist"]),
    ({**LOADED, "lora_alpha": 4}, ["lora_alpha=4.0 has no effect without lora_rank"]),
    ({"frozen_dtype": "bfloat16"}, ["frozen_dtype=bfloat16 has no effect: every weight"]),
    ({"frozen_dtype": "nf4"}, ["frozen_dtype=nf4 needs lora_rank"]),
    ({"frozen_dtype": "bf16"}, ["frozen_dtype", "float32|bfloat16|nf4"]),
    ({**LOADED, "merge_adapter": True}, ["merge_adapter=true has no effect without lora_rank"]),
    (
        {**LOADED, "lora_rank": 4, "lora_target_modules": ["all-linear", "c_attn"]},
        ["all-linear holds the others", "keep it or them"],
    ),
    (
        {**LOADED, "lora_rank": 4, "optim": "muon"},
        ["lora_rank=4 and optim=muon exclude each other", "use adamw"],
    ),
    ({"freeze_parameters": ["!*.wte.*"]}, ["!*.wte.* takes out of", "begin with what is frozen"]),
    (
        {**LOADED, "lora_rank": 4, "freeze_parameters": ["*.wte.*"]},
        ["freeze_parameters", "lora_rank=4 exclude each other", "drop the first"],
    ),
    ({"learning_rate_factors": {"*": "0.1"}}, ['learning_rate_factors, "*"', "without quotes"]),
    ({"learning_rate_factors": {"*": 0}}, ["0 is out of range: a factor must be more than 0"]),
    ({"train_file": []}, ["no data", "train_file", "dataset_name"]),
    ({"train_file": [], "eval_only": True}, ["no data for eval_only", "validation_file"]),
    ({"dataset_name": "wikitext"}, ["train_file", "dataset_name=wikitext", "keep one"]),
    ({"tokenizer_name": None}, ["model_type=gpt2", "tokenizer_name", "char, byte or bpe"]),
    (
        {"block_size": 128, "config_overrides": {"n_positions": 64}},
        ["block_size=128 is more than n_positions=64 of config_overrides", "block_size 64 or less"],
    ),
    (
        {"block_size": 9, "config_overrides": {"max_position_embeddings": 8}},
        ["block_size=9 is more than max_position_embeddings=8 of config_overrides"],
    ),
    (
        {**LOADED, "model_name_or_path": "short", "block_size": 33},
        ["block_size=33 is more than max_position_embeddings=32 of model_name_or_path=short"],
    ),
    # paths
    ({"train_file": ["missing.txt"]}, ["train_file=missing.txt does not exist", "correct"]),
    ({"validation_file": "no/such/file.txt"}, ["validation_file=no/such/file.txt", "not exist"]),
    ({"train_file": "~/no such text"}, ["/no such text does not exist"]),
    (
        {**LOADED, "model_name_or_path": "./nowhere"},
        ["model_name_or_path=./nowhere does not exist"],
    ),
    ({"tokenizer_name": "a/b/c"}, ["tokenizer_name=a/b/c does not exist"]),
    ({"resume_from_checkpoint": "nowhere"}, ["resume_from_checkpoint=nowhere is no folder"]),
    (
        {"reset_optimizer": True, "resume_from_checkpoint": "none"},
        ["reset_optimizer=true and resume_from_checkpoint=none exclude each other", "drop"],
    ),
    ({"output_dir": "good.json"}, ["output_dir=good.json is a file"]),
    ({"cache_dir": "good.json"}, ["cache_dir=good.json is a file"]),
    ({"run_name": "a/b"}, ["run_name", "a/b", "no slash"]),
    ({"run_name": ".."}, ["run_name", "cannot name a folder"]),
    ({"register_model": "a/b"}, ["register_model=a/b", "no slash and no colon"]),
    # batch sizes, for one process
    (
        {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "global_batch_size": 16,
        },
        ["global_batch_size=16", PRODUCT_OF_8, "set it to 8", "leave one of the three out"],
    ),
    (
        {"per_device_train_batch_size": 4, "global_batch_size": 10},
        ["global_batch_size=10 is not a multiple of per_device_train_batch_size=4", "8 or 12"],
    ),
    ({"gradient_accumulation_steps": 8, "global_batch_size": 4}, ["global_batch_size=4", "to 8"]),
    ({"gradient_accumulation_steps": 0, "global_batch_size": 4}, ["=0", "1 or more"]),
    # steps
    ({"warmup_steps": 11, "max_steps": 10}, ["warmup_steps=11 is more than max_steps=10"]),
    ({"warmup_steps": 10, "max_steps": 10}, ["warmup_steps=10 takes all of max_steps=10"]),
    (
        {"warmup_steps": 81, "max_steps": 100, "lr_scheduler_type": "warmup-stable-decay"},
        ["warmup_steps=81 leaves no room", "a fifth of max_steps=100, 20 steps"],
    ),
    (
        {"lr_decay_steps": 5, "lr_scheduler_type": "constant"},
        ["lr_decay_steps=5 has no effect with lr_scheduler_type=constant", "leave it out"],
    ),
    (
        {"lr_decay_steps": 5, "max_train_hours": 2},
        ["lr_decay_steps=5 and max_train_hours=2 exclude each other", "warmup-stable-decay"],
    ),
    ({"max_train_hours": 0}, ["max_train_hours=0.0", "more than 0, or null"]),
    (
        {"save_steps": 20, "max_steps": 10},
        ["save_steps=20 is more than max_steps=10", "only at the end, which save_steps=null says"],
    ),
    (
        {"eval_steps": 20, "max_steps": 10},
        ["eval_steps=20 is more than max_steps=10", "which eval_steps=10 says", "raise"],
    ),
    (
        {"early_stopping_patience": 3, "eval_steps": 5, "max_steps": 15},
        ["early_stopping_patience=3 never stops", "max_steps=15", "take 15 steps", "eval_steps"],
    ),
    (
        {"warmup_steps": 6, "lr_decay_steps": 5, "max_steps": 10},
        ["warmup_steps=6 + lr_decay_steps=5 = 11 is more than max_steps=10"],
    ),
    (
        {"lr_decay_steps": 11, "max_steps": 10, "lr_scheduler_type": "warmup-stable-decay"},
        ["lr_decay_steps=11", "more than max_steps=10"],
    ),
    # health
    ({"max_skipped_steps": -1}, ["max_skipped_steps=-1", "0 or more"]),
    ({"skip_spikes": 0}, ["skip_spikes=0.0", "more than 0, or null"]),
    (
        {"max_rewinds": 1, "save_steps": None},
        ["max_rewinds=1 needs a checkpoint", "set save_steps"],
    ),
    ({"save_before_timeout": 0}, ["save_before_timeout=0.0", "more than 0, or null"]),
    ({"verify_resume": 1}, ["verify_resume=1", "2 or more, or null"]),
    # evaluation
    ({"save_best": True, "eval_steps": None}, ["save_best=true", "set eval_steps"]),
    (
        {"early_stopping_patience": 3, "eval_steps": None},
        ["early_stopping_patience=3", "set eval_steps"],
    ),
    (
        {"early_stopping_patience": 3, "validation_split_percentage": 0},
        ["early_stopping_patience=3 needs validation data", "validation_file"],
    ),
    ({"save_best": True, "validation_split_percentage": 0}, ["save_best", "validation data"]),
    ({"eval_only": True, "validation_split_percentage": 0}, ["eval_only", "validation data"]),
    # what a start is for
    ({"dry_run": True, "eval_only": True}, ["dry_run=true and eval_only=true exclude each other"]),
    (
        {"find_batch_size": True, "verify_resume": 5, "dry_run": True},
        ["dry_run=true and find_batch_size=true and verify_resume=5 exclude", "keep one"],
    ),
    ({"dry_run_steps": 5}, ["dry_run_steps=5 has no effect without dry_run", "drop it"]),
    ({"dry_run": True, "dry_run_steps": 0}, ["dry_run_steps=0", "1 or more, or null"]),
    (
        {"allow_resume_change": ["seed"], "resume_from_checkpoint": "none"},
        ['allow_resume_change=["seed"] and resume_from_checkpoint=none', "drop the first"],
    ),
    # the hub
    ({"hub_model_id": "me/mine"}, ['hub_model_id="me/mine" has no effect without push_to_hub']),
    ({"hub_private_repo": False}, ["hub_private_repo=false has no effect without push_to_hub"]),
    (
        {"push_to_hub": True, "hub_model_id": "https://huggingface.co/me/mine"},
        ["=https://huggingface.co/me/mine cannot name a repository", "OWNER/NAME or NAME"],
    ),
    (
        {"push_to_hub": True, "hub_model_id": "my model"},
        ["hub_model_id=my model cannot name a repository", "letters a to z"],
    ),
    (
        {"push_to_hub": True, "eval_only": True},
        ["push_to_hub=true has no effect with eval_only", "llm_training.hub push RUN_FOLDER"],
    ),
    # secrets
    (
        {"tracking_uri": "https://me:pw@host/x"},
        ["tracking_uri holds a login", "MLFLOW_TRACKING_PASSWORD"],
    ),
    (
        {"config_overrides": {"a": ["hf_" + "aB3" * 10]}},
        ["config_overrides holds what looks like a key or token", "HF_TOKEN"],
    ),
    # the machine
    ({"mixed_precision": "fp16", "device": "cpu"}, ["fp16", "device=cpu", "bf16, fp32 or auto"]),
    (
        {"optim": "adamw_8bit", "device": "cpu"},
        ["optim=adamw_8bit and device=cpu exclude each other", "use optim=adamw"],
    ),
    ({"optim": "adam"}, ["optim", "adamw|muon|adamw_8bit", "did you mean adamw?"]),
    (
        {"optim": "adamw_8bit", "device": "mps"},
        ["optim=adamw_8bit and device=mps exclude each other"],
    ),
    ({"mixed_precision": "fp8", "device": "cpu"}, ["mixed_precision=fp8", "NVIDIA GPU", "bf16"]),
    ({"mixed_precision": "int8"}, ["mixed_precision", "auto|bf16|fp16|fp8|fp32", '"int8"']),
    ({"tf32": True, "device": "cpu"}, ["tf32=true has no effect with device=cpu", "drop it"]),
    ({"tf32": 1}, ["tf32", "takes true|false|null, not 1"]),
    ({"deterministic": False, "device": "cpu"}, ["deterministic=false", "repeatable anyway"]),
    ({"deterministic": None}, ["deterministic", "takes true|false, not null"]),
    (
        {"use_liger_kernel": True, "device": "cpu"},
        ["use_liger_kernel=true and device=cpu exclude each other", "GPUs"],
    ),
    ({"pad_vocab_to_multiple_of": 0}, ["pad_vocab_to_multiple_of=0", "1 or more, or null"]),
    (
        {"torch_compile_scope": "model"},
        ["torch_compile_scope=model has no effect without torch_compile"],
    ),
    (
        {"torch_compile_mode": "max-autotune"},
        ["torch_compile_mode=max-autotune has no effect without torch_compile"],
    ),
    (
        {"torch_compile": True, "torch_compile_mode": "reduce-overhead"},
        ["torch_compile_mode=reduce-overhead records CUDA graphs", "torch_compile_scope=model"],
    ),
    ({"torch_compile_mode": "max"}, ["torch_compile_mode", "default|reduce-overhead", '"max"']),
    ({"report_to": ["none", "mlflow"]}, ["report_to", "none alone"]),
    ({"report_to": ["mlflow", "mlflow"]}, ["report_to", "once"]),
]

# Flags after a good file, and what the one problem must say.
BAD_FLAGS: list[tuple[str, list[str]]] = [
    ("--learnig_rate 1e-3", [f"learnig_rate {FLAG}", "did you mean learning_rate"]),
    ("--no_seed", ["no_seed", "no such argument"]),
    ("--seed 1 --seed 2", [f"seed {FLAG}", "given twice"]),
    ("--save_best --no_save_best", ["save_best", "given twice"]),
    ("--seed", [f"seed {FLAG}", "no value", "--seed VALUE"]),
    ("--seed 1 other.json", ["seed", "takes one value, not 2", "other.json"]),
    ("--save_best yes", ["save_best", 'takes true|false, not "yes"']),
    ("--no_save_best true", ["save_best", "takes one value"]),
    ("--max_steps 1e3", ["max_steps", "takes integer|null, not 1000.0", "write 1000"]),
    ("--max_steps 100.0", ["max_steps", "write 100"]),
    ("--max_steps 1_000", ["max_steps", '"1_000"']),
    ("--max_steps " + "9" * 5000, ["max_steps", "takes integer|null"]),
    ("--max_steps true", ["max_steps", "takes integer|null, not true"]),
    ("--warmup_steps null", ["warmup_steps", "takes integer, not null"]),
    ("--learning_rate fast", ["learning_rate", 'takes number, not "fast"']),
    ("--learning_rate nan", ["learning_rate", '"nan"']),
    ("--learning_rate 1e999", ["learning_rate", "Infinity"]),
    ("--learning_rate=", ["learning_rate", 'not ""']),
    ("--weight_decay -1", ["weight_decay=-1.0", "0 or more", "weight_decay: command line"]),
    ("--weight-decay=-2", ["weight_decay=-2.0", "0 or more"]),
    ("--seed ${NOT_SET}", ["seed", "set NOT_SET"]),
    ("--config_overrides n_layer", ["config_overrides", '"n_layer"', "n_layer=6,n_embd=384"]),
    ("--config_overrides n_layer=6,", ["config_overrides", "n_layer=6,n_embd=384"]),
    ("--config_overrides n_layer=6,n_layer=7", ["config_overrides", "n_layer stands twice"]),
    ("--config_overrides {n_layer:6}", ["config_overrides", "not valid JSON", "column 2"]),
    ('--config_overrides {"a":1,"a":2}', ["config_overrides", "a stands twice"]),
    ("--report_to none mlflow", ["report_to", "none alone"]),
    ("--max_train_hours soon", ["max_train_hours", 'takes number|null, not "soon"']),
    ("--dry_run yes", ["dry_run", 'takes true|false, not "yes"']),
    ("--find_batch_size 8", ["find_batch_size", "takes true|false, not 8"]),
    (
        "--save_steps 30 --max_steps 20",
        ["save_steps=30", "max_steps=20", f"save_steps: {FLAG[1:-1]}"],
    ),
    ("--from_run nowhere", [f"from_run {FLAG}", "nowhere is no folder, and no run id"]),
    # names of other tools
    ("--max_iters 5", ["max_iters", "no such argument", "nanoGPT's", "--max_steps 5"]),
    ("--bf16", ["bf16", "TrainingArguments'", "--mixed_precision bf16"]),
    ("--micro_batch_size 4", ["Megatron-LM's", "--per_device_train_batch_size 4"]),
    ("--quantization_bit 4", ["LLaMA-Factory's", "give --frozen_dtype nf4"]),
    ("--batch_size 8", ["several things", "per_device_train_batch_size", "global_batch_size"]),
    ("--optim adamw_torch", ["optim", "adamw|muon|adamw_8bit", '"adamw_torch"']),
]

# Files of any form after a good one, and what the one problem must say.
BAD_FILES: list[tuple[str, str, list[str]]] = [
    ("x.yaml", "model: {seed: 1}", ["seed (x.yaml line 1)", "section model, but belongs to run"]),
    ("x.yaml", "\nmodel: gpt2", ["model (x.yaml line 2)", "is a section, not a value"]),
    ("x.yaml", "seed: 1\nrun:\n  seed: 2", ["seed (x.yaml line 1 and line 3)", "stands twice"]),
    ("x.yaml", "trainin: {max_steps: 2}", ["trainin (x.yaml line 1)", "no such argument"]),
    ("x.yaml", "optimization:\n  lr: 0.1", ["lr (x.yaml line 2)", "--learning_rate 0.1"]),
    ("x.yaml", "run_name: no", ["true or false to others", '"no" in quotes']),
    ("x.yaml", "cache_dir: ${NOT_SET}", ["cache_dir (x.yaml line 1)", "set NOT_SET"]),
    ("x.yaml", "seed: [1", ["argument file x.yaml: not valid YAML", "line 1"]),
    ("x.toml", "[run]\nsede = 1", ["sede (x.toml line 2)", "did you mean seed"]),
    ("x.toml", "[model]\nseed = 1", ["seed (x.toml line 2)", "section model, but belongs to run"]),
    ("x.toml", "max_steps = 1.5", ["max_steps (x.toml line 1)", "integer|null, not 1.5"]),
    ("x.toml", "seed = 1\nseed = 2", ["argument file x.toml: not valid TOML", "overwrite"]),
    ("x.json", '{"seed": 1, "seed": 2}', ["seed (x.json line 1 and line 1)", "stands twice"]),
    ("x.json", '{"seed": 1,}', ["argument file x.json: not valid JSON", "column 12"]),
    ("x.json", '["seed"]', ['argument file x.json: holds ["seed"], not one object']),
]
