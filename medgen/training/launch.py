"""Run a command in several processes with torch.distributed's launcher, the one that torchrun uses.

torchrun's environment variables apply, such as PET_NNODES and PET_RDZV_ENDPOINT for several machines.
"""

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, get_args_parser

from medgen.config import Params
from medgen.errors import NonFiniteError, TrainingInterrupted, UserError
from medgen.machine import num_threads, signal_handler
from medgen.training.distributed import group_size

# exit codes with which all processes end at the same step; 130 is Ctrl-C
JOINT_CODES = (0, NonFiniteError.exit_code, TrainingInterrupted.exit_code, 128 + signal.SIGINT)
SECONDS_FOR_MAIN = 5.0  # the main process has them to report an error that all processes have


def launch(command: Callable[[], None], params: Params, stage: str) -> bool:
    """Run `command` in the processes that `compute.processes` asks for.

    Args:
        command: a function of a module, which reads sys.argv.
        params: all parameters.
        stage: the section whose batch size is divided among the processes.

    Returns:
        False if this process has to do the work: it is one of a group already, or one process is enough.

    Raises:
        UserError: more processes than GPUs.
        SystemExit: a process failed; the exit code is its own.
    """
    if group_size() is not None:
        return False
    num_nodes = int(os.environ.get("PET_NNODES", "1").split(":")[-1])
    count = num_processes(params, stage, num_nodes)
    if count * num_nodes == 1:
        return False
    os.environ["OMP_NUM_THREADS"] = str(max(1, num_threads() // count))
    arguments = ["--nproc-per-node", str(count), "--monitor-interval", "0.1", "medgen"]
    if "PET_RDZV_ENDPOINT" not in os.environ:
        arguments = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *arguments]
    logging.disable()  # of the launcher: the processes report their own errors
    with tempfile.TemporaryDirectory() as logs:
        arguments = ["--log-dir", logs, *arguments]  # otherwise it makes one more, and leaves it
        output = DefaultLogsSpecs(logs, dict.fromkeys(range(1, count), Std.ALL))
        # this process forwards signals itself, and the processes decide how to end
        config = replace(
            config_from_args(get_args_parser().parse_args(arguments))[0],
            logs_specs=output,
            signals_to_handle="SIGHUP,SIGQUIT",
        )
        numbers = [signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            numbers.append(signal.SIGINT)
        with signal_handler(numbers, forward):
            try:
                code = max(elastic_launch(config, work)(command).values())
            except ChildFailedError as error:
                rank, failure = error.get_first_failure()
                if failure.local_rank:  # the main process has printed its own error
                    path = Path(logs).rglob(f"{failure.local_rank}/stderr.log")
                    print(f"process {rank}:", *(each.read_text() for each in path), sep="\n", file=sys.stderr)
                code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode  # ended by a signal
    if code:
        sys.exit(code)
    return True


def num_processes(params: Params, stage: str, num_nodes: int) -> int:
    """Number of processes on this machine.

    "auto" is one for each GPU, or fewer if they could not divide the stage's batch evenly, and one on a CPU.

    Raises:
        UserError: more processes than GPUs.
    """
    gpus = torch.cuda.device_count() if stage != "train" or params.train.device != "cpu" else 0
    wanted = params.compute.processes
    if wanted != "auto":
        if 0 < gpus < wanted:
            raise UserError(f"compute.processes: {wanted}, but torch finds {gpus} GPUs; use auto, or at most {gpus}")
        return wanted
    section = getattr(params, stage)
    batch_size, parts = getattr(section, "batch_size", 0), getattr(section, "accumulate_steps", 1)
    return next((n for n in range(gpus, 1, -1) if batch_size % (n * num_nodes * parts) == 0), 1)


def forward(number: int, _: object) -> None:
    """Pass a signal on to the processes."""
    processes = multiprocessing.active_children()
    for process in processes:
        if process.pid:
            os.kill(process.pid, number)
    if not processes:
        sys.exit(128 + number)


def work(command: Callable[[], None]) -> int:
    """Run the command in one of the processes; return its exit code if all processes end with the same.

    With another code the process ends, and the launcher ends the others.
    """
    os.setpgrp()  # Ctrl-C reaches the launcher alone, which forwards it
    signal.signal(signal.SIGINT, signal.default_int_handler)  # torch sends SIGINT if the launcher is killed
    code: object = 0
    try:
        command()
    except SystemExit as stop:
        code = stop.code or 0
    launcher = multiprocessing.parent_process()
    if isinstance(code, int) and code in JOINT_CODES and launcher is not None:
        threading.Thread(target=exit_after, args=(launcher, code), daemon=True).start()
        return code
    if code == UserError.exit_code and int(os.environ["LOCAL_RANK"]):
        time.sleep(SECONDS_FOR_MAIN)
    sys.exit(code)  # type: ignore[arg-type]  # as it came


def exit_after(launcher: BaseProcess, code: int) -> None:
    """End this process when the launcher has ended; torch lets it wait for a killed one for ever."""
    launcher.join()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # also if nobody reads the output any more
        os._exit(code)
