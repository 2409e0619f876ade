"""`train_llm.py` that gets a signal at a given place: WHOM SIGNAL PLACE NUMBER RANK, its arguments.

WHOM is `self`, `launcher` or `all`: the launcher and its processes, as Slurm ends a job. PLACE is
where the process of RANK sends it: in `step`, `evaluation` or `save` number NUMBER, or in the
`build`.
"""

import os
import signal
import sys
import time

import psutil

import train_llm
from llm_training import checkpoint_writing, judging, network, ranks
from llm_training.argument_parsing import parse_arguments
from llm_training.stopping import end_with_launcher

WHOM, SIGNAL, PLACE, NUMBER, RANK = sys.argv[1:6]
IS_SENDER = os.environ.get("RANK", "0") == RANK
AFTERWARDS_SECONDS = 0.1  # of every later step: the signal arrives before the run is over
before_call = {"step": 0, "evaluation": 0, "save": 0, "build": 0}


def send() -> None:
    launcher = psutil.Process(os.getppid())
    receivers = {
        "self": [psutil.Process()],
        "launcher": [launcher],
        "all": [launcher, *launcher.children(recursive=True)],
    }
    for process in receivers[WHOM]:
        process.send_signal(signal.Signals[SIGNAL])


def signalled(place, work):
    """`work`, before which the signal is sent when its turn has come."""

    def call(*args, **kwargs):
        if place == PLACE and IS_SENDER and before_call[place] == int(NUMBER):
            send()
        before_call[place] += 1
        if place == "step" and before_call[PLACE] > int(NUMBER):
            time.sleep(AFTERWARDS_SECONDS)
        return work(*args, **kwargs)

    return call


train_llm.compute_gradients = signalled("step", train_llm.compute_gradients)
judging.evaluate_sets = signalled("evaluation", judging.evaluate_sets)
network.build_model = signalled("build", network.build_model)
save_model_state = signalled("save", checkpoint_writing.save_model_state)
checkpoint_writing.save_model_state = save_model_state
end_with_launcher()
ranks.leave(train_llm.main(parse_arguments(sys.argv[6:])))
