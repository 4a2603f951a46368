"""Training: phases as data, one visible loop, resumed by running the same command again.

medgen train
torchrun --nproc-per-node 2 -m medgen train
"""

from pathlib import Path

import torch
from torch import Tensor

from medgen import guard, optim
from medgen.config import Loss, Model, Phase, Project, Tracking, Train, Weights, seed_of
from medgen.distributed import join
from medgen.errors import NonFiniteError
from medgen.job import Job, Meter
from medgen.losses import SCORES
from medgen.metrics.latent import codebook_use
from medgen.progress import Display
from medgen.tracking import Tracker, history
from medgen.training_report import draw_epoch, write_report
from medgen.types import ModelOutput


def run(project: Project, *, model: Model, loss: Loss, train: Train, tracking: Tracking) -> Path:
    """Trains to the end of the last phase, exports artifacts/model, returns the run's scratch folder.

    Raises:
        UserError: the store, a parameter or the weights of the perceptual term are missing or wrong.
        NonFiniteError: a loss or gradient was not finite and the policy gives up.
        TrainingInterrupted: SIGTERM or SIGUSR1 asked to stop; the checkpoint holds all that was done.
    """
    with join(train.device) as world:
        job = Job(project, world, model, loss, train)
        with job.record(tracking) as tracker, job.stop.listening():
            job.resume()
            with Display(job.epochs_done, job.total_epochs, world.is_main) as display:
                while (phase := job.phase()) is not None:
                    if train_epoch(job, phase, display):
                        finish_epoch(job, phase, tracker, display)
            if tracker:
                job.export()
                for path in write_report(project.reports, job.scratch, history(job.scratch), job.drawn_epochs):
                    tracker.artifact(path, "figures")
        return job.scratch


def train_epoch(job: Job, phase: Phase, display: Display) -> bool:
    """The rest of the epoch; False where it was rolled back and has to be entered again."""
    state = job.state
    weights = phase.weights or job.loss.weights
    meter = Meter(state.sums)
    job.network.train()
    while state.step < job.loader.num_batches:
        torch.manual_seed(seed_of(job.train.seed, state.position, job.world.rank))
        batch = job.loader.batch(state.position)
        output = job.forward(job.network, batch)
        losses = job.objective(output, job.target(batch), weights, job.beta(phase))
        job.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        norm = optim.clip_gradients(job.network.parameters(), job.train.clip_norm)
        skip = job.guard.check(losses.total, norm, state.position)
        optim.set_rate(job.optimizer, job.rate(phase))
        job.optimizer.found_inf = skip  # type: ignore[attr-defined]  # the fused step skips itself where it is 1
        job.optimizer.step()
        if job.average:
            job.average.update(skip)
        meter.add({"loss": losses.total.detach(), **losses.terms, "gradient_norm": norm})
        state.step += 1
        state.position += 1

        stop = job.stop_is_due()
        save_now = stop or job.save_is_due()
        bad = job.guard.read(state.position, force=save_now or state.step == job.loader.num_batches)
        if bad is not None:
            recover(job, phase, weights, bad)
            return False
        if save_now:
            state.sums = job.world.mean_of(meter.sums())  # all processes will take up the main one's
            job.save()
        if stop:
            raise job.interruption()
        display.step(state.step / job.loader.num_batches, len(batch.image) * job.world.size, losses.terms)
    state.sums = meter.sums()
    return True


def finish_epoch(job: Job, phase: Phase, tracker: Tracker | None, display: Display) -> None:
    """Validates, logs, draws, saves."""
    state = job.state
    with job.averaged_weights():
        # one number for all processes: each steps its own plateau by it
        validation = job.world.mean_of(validate(job, phase.weights or job.loss.weights))
    record = {
        **{f"train/{name}": total / state.step for name, total in job.world.mean_of(state.sums).items()},
        **{f"val/{name}": value for name, value in validation.items()},
        "train/learning_rate": job.rate(phase),
        "train/beta": job.beta(phase),
        "train/beta_effective": job.objective.effective_beta(job.beta(phase), job.latent_numel),
    }
    state.plateau.update(validation["loss"], phase.schedule)
    state.epoch, state.step, state.sums = state.epoch + 1, 0, {}
    epoch = state.position // job.loader.num_batches
    if tracker:
        tracker.metrics(record, step=epoch)
        tracker.metrics({"run/images_per_second": display.images_per_second}, step=epoch)
        if epoch in job.drawn_epochs:
            with job.averaged_weights():
                paths = draw_epoch(job.model, job.loader, job.validation, job.scratch, epoch, job.train.seed)
            for name, path in paths.items():
                tracker.image(name, path, step=epoch)
        display.epoch(epoch, phase.name, record)
    job.save()


@torch.no_grad()
def validate(job: Job, weights: Weights) -> dict[str, float]:
    """Over the whole validation split, without randomness: loss (image terms), and the scores of what was learnt."""
    job.model.eval()
    scores = {name: 0.0 for name in ("loss", *SCORES[job.model.target])}
    codes: list[Tensor] = []
    for batch in job.validation.sequential():
        with job.autocast():
            output = job.model.predict(batch.image, batch.label)
        result, target, size = output.reconstruction.float(), job.target(batch), len(batch.image)
        scores["loss"] += size * float(job.objective(ModelOutput(result, output.latent), target, weights, 0.0).total)
        for name, score in SCORES[job.model.target].items():
            scores[name] += size * float(score(result, target))
        if output.latent is not None and output.latent.codes is not None:
            codes.append(output.latent.codes.cpu())
    means = {name: total / len(job.validation.images) for name, total in scores.items()}
    return means | (codebook_use(torch.cat(codes), job.params.num_codes) if codes else {})


def recover(job: Job, phase: Phase, weights: Weights, bad: int) -> None:
    """Writes down what happened at position `bad`; then rolls back or stops, as train.on_nonfinite says."""
    state, train = job.state, job.train
    state.step -= state.position - bad
    torch.manual_seed(seed_of(train.seed, bad, job.world.rank))
    batch = job.loader.batch(bad)
    job.model.train()
    # the guard skipped every update since: these are the weights that met the batch
    losses = job.objective(job.forward(job.model, batch), job.target(batch), weights, job.beta(phase))
    job.model.zero_grad(set_to_none=True)
    losses.total.backward()
    norms = guard.gradient_norms(job.model)
    terms = {**losses.terms, "total": losses.total.detach()}
    term = guard.first_nonfinite(terms)
    path = job.scratch / f"nonfinite_step_{bad}_rank_{job.world.rank}.json"
    again = train.on_nonfinite == "rollback" and state.num_rollbacks < train.max_rollbacks
    guard.write_forensics(
        path,
        facts={
            "step": bad,
            "phase": phase.name,
            "epoch": bad // job.loader.num_batches + 1,
            "first_nonfinite": term,
            # a GPU's compiled step may round otherwise than this plain repeat of it
            "reproduced": any(isinstance(norm, str) for norm in norms.values()),
            "beta": job.beta(phase),
            "learning_rate": job.rate(phase),
            "action": f"rollback {state.num_rollbacks + 1} of {train.max_rollbacks}" if again else "stop",
        },
        terms=terms,
        gradient_norms=norms,
        image=batch.image,
        files=[job.train_files[row] for row in batch.index.tolist()],
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
