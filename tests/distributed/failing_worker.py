"""`train_llm.py` in which one rank fails at a given place: FAULT STEP RANK, then its arguments."""

import os
import signal
import sys
import time
from pathlib import Path

import train_llm
from llm_training import ranks, run, run_data
from llm_training.argument_parsing import parse_arguments
from llm_training.data import DataError

FAULT, STEP, RANK = sys.argv[1], int(sys.argv[2]), sys.argv[3]
IS_FAULTY = os.environ["RANK"] == RANK
step_as_it_is, prepare_as_it_is = train_llm.compute_gradients, run_data.prepare_data


def faulty_step(training, *args):
    if IS_FAULTY and training.state.step == STEP:
        if FAULT == "kill":
            time.sleep(2)  # the other rank waits for this one by then, and notices at once
        print(f"fault at {time.time()}", flush=True)
        if FAULT == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if FAULT == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        if FAULT == "raise":
            raise DataError("row 7 cannot be read.")
    return step_as_it_is(training, *args)


def slow_data(*args, **kwargs):
    """Takes longer than an exchange may, as large data does."""
    if IS_FAULTY and FAULT == "slow_data":
        time.sleep(STEP)
    if IS_FAULTY and FAULT == "no_data":
        raise DataError("no such corpus.")
    return prepare_as_it_is(*args, **kwargs)


def other_folder(accelerator, folder):
    """As if each rank were a machine, and the faulty one did not see the output folder."""
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    ranks.SHARED_FOLDER_SECONDS = 2.0
    if IS_FAULTY:
        Path.exists = lambda path: False
    shared_as_it_is(accelerator, folder)


if FAULT == "other_folder":
    shared_as_it_is, run.find_shared_folder = run.find_shared_folder, other_folder
train_llm.compute_gradients = faulty_step
run_data.prepare_data = slow_data
ranks.leave(train_llm.main(parse_arguments(sys.argv[4:])))
