"""The training loop of every network: models, priors, refiner and domain extractor."""

from collections.abc import Callable, Mapping

from medgen.config import Phase
from medgen.errors import NonFiniteError
from medgen.tracking import Tracker
from medgen.training import guard
from medgen.training.cores import share_cores
from medgen.training.optimizers import clip_gradients, set_rate
from medgen.training.progress import Display
from medgen.training.state import Forward, Meter, TrainState

AfterEpoch = Callable[[int, Mapping[str, float]], None]


def train_to_end(state: TrainState, tracker: Tracker | None, after_epoch: AfterEpoch | None = None) -> None:
    """Train to the end of the last phase, from the checkpoint if there is one.

    Args:
        state: what is trained.
        tracker: the run's record; None in processes other than the main one.
        after_epoch: called with the number of epochs done and the metrics of the last; an exception ends the training.

    Raises:
        UserError: the checkpoint is damaged, or from a longer training.
        NonFiniteError: a loss or gradient was not finite, and `train.on_nonfinite` says to stop.
        TrainingInterrupted: SIGTERM or SIGUSR1 asked to stop; the checkpoint holds everything done so far.
    """
    state.resume()
    with share_cores(), Display(state.epochs_done, state.total_epochs, state.world.is_main) as display:
        while (phase := state.next_phase()) is not None:
            if train_epoch(state, phase, display):
                metrics = finish_epoch(state, phase, tracker, display)
                if after_epoch:
                    after_epoch(state.epochs_done, metrics)


def train_epoch(state: TrainState, phase: Phase, display: Display) -> bool:
    """Train the rest of the epoch; return False after a rollback, when it has to be entered again."""
    task, train, counters = state.task, state.train, state.counters
    meter = Meter(counters.sums)
    state.network.train()
    while counters.step < task.num_batches:
        losses = state.backward(state.network, counters.position, phase, state.epoch_at(counters.step))
        norm = clip_gradients(state.network.parameters(), train.clip_norm)
        skip = state.guard.check(losses.total, norm, counters.position)
        set_rate(state.optimizer, state.rate_at(counters.step, phase))
        state.optimizer.found_inf = skip  # type: ignore[attr-defined]  # the fused step does nothing where it is 1
        state.optimizer.step()
        if state.average:
            state.average.update(skip)
        meter.add({"loss": losses.total, **losses.terms, "gradient_norm": norm})
        counters.step += 1
        counters.position += 1

        stop, save = state.due()
        save_now = stop or save
        bad = state.guard.read(counters.position, force=save_now or counters.step == task.num_batches)
        if bad is not None:
            recover(state, phase, bad)
            return False
        if save_now:
            counters.sums = state.world.mean_of(meter.sums())  # every process resumes from the main one's
            state.save()
        if stop:
            raise state.interruption()
        display.step(counters.step / task.num_batches, task.batch_size, losses.terms)
    counters.sums = meter.sums()
    return True


def finish_epoch(state: TrainState, phase: Phase, tracker: Tracker | None, display: Display) -> dict[str, float]:
    """Validate, log, draw and save; return the epoch's metrics."""
    task, world, counters = state.task, state.world, state.counters
    last = counters.step - 1  # at the epoch's end a schedule may already start again
    logged = {"learning_rate": state.rate_at(last, phase), **task.scalars(phase, state.epoch_at(last))}
    with state.averaged_weights():
        state.model.eval()
        validation = task.validate(phase)
        state.keep_best(validation["objective"])
    metrics = {
        **{f"train/{name}": total / counters.step for name, total in world.mean_of(counters.sums).items()},
        **{f"val/{name}": value for name, value in validation.items()},
        **{f"train/{name}": value for name, value in logged.items()},
    }
    counters.plateau.update(validation["objective"], phase.schedule)
    counters.epoch, counters.step, counters.sums = counters.epoch + 1, 0, {}
    if tracker:
        epoch = state.epochs_done
        tracker.metrics(metrics, step=epoch)
        tracker.durations({"run/images_per_second": display.images_per_second}, step=epoch)
        if epoch in state.drawn_epochs:
            with state.averaged_weights():
                paths = task.draw(state.scratch, epoch)
            for name, path in paths.items():
                tracker.image(name, path, step=epoch)
        display.epoch(epoch, phase.name, metrics)
        tracker.flush()  # an epoch that the checkpoint holds is not recorded again
    state.save()
    return metrics


def recover(state: TrainState, phase: Phase, bad: int) -> None:
    """Write a report on the non-finite step at position `bad`; then roll back or stop, as train.on_nonfinite says."""
    task, train, counters = state.task, state.train, state.counters
    step = counters.step - (counters.position - bad)
    epoch = state.epoch_at(step)
    state.model.train()
    # the guard has skipped every update since: the weights are those before the bad step
    losses = state.backward(Forward(task, state.model), bad, phase, epoch)
    norms = guard.gradient_norms(state.model)
    terms = {**losses.terms, "total": losses.total}
    term = guard.first_nonfinite(terms)
    path = state.scratch / f"nonfinite_step_{bad}_rank_{state.world.rank}.json"
    again = train.on_nonfinite == "rollback" and counters.num_rollbacks < train.max_rollbacks
    images, files = task.inputs(bad)
    guard.write_forensics(
        path,
        facts={
            "step": bad,
            "phase": phase.name,
            "epoch": bad // task.num_batches + 1,
            "first_nonfinite": term,
            # a compiled step on a GPU may round differently from this plain repetition
            "reproduced": any(isinstance(norm, str) for norm in norms.values()),
            **task.scalars(phase, epoch),
            "learning_rate": state.rate_at(step, phase),
            "action": f"rollback {counters.num_rollbacks + 1} of {train.max_rollbacks}" if again else "stop",
        },
        terms=terms,
        gradient_norms=norms,
        images=images,
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
    state.roll_back()
