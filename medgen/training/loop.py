"""The training loop: one for everything that learns by gradient, models and priors alike."""

from collections.abc import Callable, Mapping

import torch

from medgen.config import Phase, seed_of
from medgen.errors import NonFiniteError
from medgen.tracking import Tracker
from medgen.training import guard, optimizers
from medgen.training.progress import Display
from medgen.training.state import Job, Meter

AfterEpoch = Callable[[int, Mapping[str, float]], None]


def train_to_end(job: Job, tracker: Tracker | None, after_epoch: AfterEpoch | None = None) -> None:
    """Trains to the end of the last phase, from the checkpoint where there is one.

    Args:
        job: what is trained.
        tracker: the run's record; None in processes other than the main one.
        after_epoch: is given how many epochs are done and the last one's record; what it raises ends the training.

    Raises:
        UserError: the checkpoint is damaged, or from a longer training.
        NonFiniteError: a loss or gradient was not finite and the policy gives up.
        TrainingInterrupted: SIGTERM or SIGUSR1 asked to stop; the checkpoint holds all that was done.
    """
    job.resume()
    with Display(job.epochs_done, job.total_epochs, job.world.is_main) as display:
        while (phase := job.phase()) is not None:
            if train_epoch(job, phase, display):
                record = finish_epoch(job, phase, tracker, display)
                if after_epoch:
                    after_epoch(job.epochs_done, record)


def train_epoch(job: Job, phase: Phase, display: Display) -> bool:
    """The rest of the epoch; False where it was rolled back and has to be entered again."""
    state, num_batches = job.state, job.task.num_batches
    meter = Meter(state.sums)
    job.network.train()
    while state.step < num_batches:
        torch.manual_seed(seed_of(job.train.seed, state.position, job.world.rank))
        losses = job.task.losses(job.network, state.position, phase, job.epoch)
        job.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        norm = optimizers.clip_gradients(job.network.parameters(), job.train.clip_norm)
        skip = job.guard.check(losses.total, norm, state.position)
        optimizers.set_rate(job.optimizer, job.rate(phase))
        job.optimizer.found_inf = skip  # type: ignore[attr-defined]  # the fused step skips itself where it is 1
        job.optimizer.step()
        if job.average:
            job.average.update(skip)
        meter.add({"loss": losses.total.detach(), **losses.terms, "gradient_norm": norm})
        state.step += 1
        state.position += 1

        stop = job.stop_is_due()
        save_now = stop or job.save_is_due()
        bad = job.guard.read(state.position, force=save_now or state.step == num_batches)
        if bad is not None:
            recover(job, phase, bad)
            return False
        if save_now:
            state.sums = job.world.mean_of(meter.sums())  # all processes will take up the main one's
            job.save()
        if stop:
            raise job.interruption()
        display.step(state.step / num_batches, job.task.batch_size, losses.terms)
    state.sums = meter.sums()
    return True


def finish_epoch(job: Job, phase: Phase, tracker: Tracker | None, display: Display) -> dict[str, float]:
    """Validates, logs, draws, saves; returns the epoch's record."""
    state = job.state
    state.step -= 1  # the epoch's last step: at its end a schedule may already begin anew
    used = {"learning_rate": job.rate(phase), **job.task.record(phase, job.epoch)}
    state.step += 1
    job.share_statistics()
    with job.averaged_weights():
        job.model.eval()
        # one number for all processes: each steps its own plateau by it
        validation = job.world.mean_of(job.task.validate(phase))
        job.keep_best(validation["objective"])
    record = {
        **{f"train/{name}": total / state.step for name, total in job.world.mean_of(state.sums).items()},
        **{f"val/{name}": value for name, value in validation.items()},
        **{f"train/{name}": value for name, value in used.items()},
    }
    state.plateau.update(validation["objective"], phase.schedule)
    state.epoch, state.step, state.sums = state.epoch + 1, 0, {}
    if tracker:
        tracker.metrics(record, step=job.epochs_done)
        tracker.metrics({"run/images_per_second": display.images_per_second}, step=job.epochs_done)
        if job.epochs_done in job.drawn_epochs:
            with job.averaged_weights():
                paths = job.task.draw(job.scratch, job.epochs_done)
            for name, path in paths.items():
                tracker.image(name, path, step=job.epochs_done)
        display.epoch(job.epochs_done, phase.name, record)
    job.save()
    return record


def recover(job: Job, phase: Phase, bad: int) -> None:
    """Writes down what happened at position `bad`; then rolls back or stops, as train.on_nonfinite says."""
    state, train = job.state, job.train
    state.step -= state.position - bad
    torch.manual_seed(seed_of(train.seed, bad, job.world.rank))
    job.model.train()
    # the guard skipped every update since: these are the weights that met the batch
    losses = job.task.losses(job.model, bad, phase, job.epoch)
    job.model.zero_grad(set_to_none=True)
    losses.total.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    norms = guard.gradient_norms(job.model)
    terms = {**losses.terms, "total": losses.total.detach()}
    term = guard.first_nonfinite(terms)
    path = job.scratch / f"nonfinite_step_{bad}_rank_{job.world.rank}.json"
    again = train.on_nonfinite == "rollback" and state.num_rollbacks < train.max_rollbacks
    given, files = job.task.inputs(bad)
    guard.write_forensics(
        path,
        facts={
            "step": bad,
            "phase": phase.name,
            "epoch": bad // job.task.num_batches + 1,
            "first_nonfinite": term,
            # a GPU's compiled step may round otherwise than this plain repeat of it
            "reproduced": any(isinstance(norm, str) for norm in norms.values()),
            **job.task.record(phase, job.epoch),
            "learning_rate": job.rate(phase),
            "action": f"rollback {state.num_rollbacks + 1} of {train.max_rollbacks}" if again else "stop",
        },
        terms=terms,
        gradient_norms=norms,
        given=given,
        files=files,
    )
    if not again:
        raise NonFiniteError(
            f"training stopped: {term} is not finite at step {bad} (phase {phase.name}); see {path}. "
            "Lower train.phases.*.learning_rate or the KL weight, or set train.on_nonfinite: rollback",
            step=bad,
            phase=phase.name,
            term=term,
            forensics=path,
        )
    job.roll_back()
