#!/usr/bin/env bash
#
# Trains on the nodes of a Slurm job, with one `accelerate launch` on each node. From the folder of
# train_llm.py, with its environment active and output_dir and data on storage all nodes share:
#
#   sbatch accelerate_configs/slurm.sh run.json accelerate_configs/multi_node_fsdp.yaml
#   sbatch --nodes=4 accelerate_configs/slurm.sh run.json accelerate_configs/multi_node_zero3.yaml \
#       --max_steps 20000
#
# Words behind the two files go to train_llm.py. Options of sbatch go before those written here. Any
# YAML of this folder but tp.yaml and cp.yaml will do: machines and processes are counted below.

# The name of the job, and so of its log.
#SBATCH --job-name=train_llm
# How many machines.
#SBATCH --nodes=2
# One launcher on each; it starts a process for each GPU.
#SBATCH --ntasks-per-node=1
# GPUs of each machine.
#SBATCH --gpus-per-node=8
# CPU cores of each machine, shared by its processes.
#SBATCH --cpus-per-task=64
# The longest that Slurm lets it run before it is interrupted, and then queued again (see below).
#SBATCH --time=24:00:00
# Two minutes before that, Slurm sends USR1 to this script (B:), not to the training.
#SBATCH --signal=B:USR1@120
# After a failure of a node or a preemption Slurm itself queues the job again...
#SBATCH --requeue
# ...and the log goes on where it stood. %x is the name of the job, %j its number.
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

if (($# < 2)); then
    echo "usage: sbatch $0 RUN_FILE ACCELERATE_CONFIG [ARGUMENTS OF train_llm.py ...]" >&2
    exit 2
fi
run_file=$1
config_file=$2
shift 2

# Where the cluster has several networks, name the one between the nodes: `ip -brief address` lists
# them. Without it gloo and NCCL guess, and may meet on an address that leads nowhere.
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0
# Where compute nodes cannot reach the hub, this spares the time until it is given up.
# export HF_HUB_OFFLINE=1

gpus=${SLURM_GPUS_ON_NODE:?"Slurm gave no GPUs: ask for them with sbatch --gpus-per-node=8"}
processes=$((SLURM_JOB_NUM_NODES * gpus))

# All processes meet on the first node, which Slurm numbers 0. The port is of the job itself, so two
# jobs that share a node do not collide; 10000 to 29999 is below what systems give away themselves.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_node=${hosts%%$'\n'*}
port=$((10000 + SLURM_JOB_ID % 20000))

# The time is nearly up: end the training and queue this job again. Every checkpoint is whole or not
# there, so the next start continues from the newest, whenever this one was interrupted.
requeue() {
    trap '' USR1
    echo "slurm.sh: the time is up; stopping the training and queueing the job again"
    kill -TERM "$step" || true # srun hands it on to its tasks
    if wait "$step"; then
        exit 0 # it ended in this very moment
    fi
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}

# Single quotes: SLURM_NODEID is another number on each node, so it is read there. exec: signals of
# Slurm reach the launcher and not a shell in between. If one node fails, the others are ended too
# (--kill-on-bad-exit), where they would wait for it until --ddp_timeout.
options=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1)
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # srun does not take it over from sbatch
fi
# shellcheck disable=SC2016
srun "${options[@]}" bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' launch \
    --config_file "$config_file" \
    --num_machines "$SLURM_JOB_NUM_NODES" \
    --num_processes "$processes" \
    --main_process_ip "$head_node" \
    --main_process_port "$port" \
    --deepspeed_multinode_launcher standard \
    train_llm.py "$run_file" "$@" &
step=$!
trap requeue USR1

# In the background, because a shell hears signals only while it waits. The exit code is srun's.
wait "$step"
