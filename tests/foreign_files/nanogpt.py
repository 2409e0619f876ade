"""A small character model, as nanoGPT's config files look."""

import time

out_dir = "out-tiny"
eval_interval = 250
eval_iters = 20
log_interval = 10
always_save_checkpoint = False
wandb_log = False
wandb_project = "tiny"
wandb_run_name = "tiny-" + str(time.time())

dataset = "tiny_char"
gradient_accumulation_steps = 2
batch_size = 64
block_size = 256  # characters

n_layer = 6
n_head = 6
n_embd = 64 * n_head
dropout = 0.2

learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = max_iters
min_lr = learning_rate / 10
beta2 = 0.99
warmup_iters = 100
compile = False
backend = "gloo"
