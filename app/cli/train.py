"""`lodger train`: one job from the command line, nothing else running. Writes a PEFT directory, a plot, a CSV."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.flags import with_settings
from app.cli.output import say
from app.settings_sources import LoadedSettings

if TYPE_CHECKING:
    from app.training.job import Job
    from app.worker import Worker

TENANT = "local"
POLL_S = 0.2
Metrics = Sequence[tuple[int, Mapping[str, Any]]]

File = Annotated[Path, typer.Argument(metavar="FILE", help="Training data: JSONL, or gzip of it.", exists=True)]
Out = Annotated[Path, typer.Option("--out", help="Directory for the adapter, loss.png and metrics.csv.")]
Validation = Annotated[Path | None, typer.Option("--validation", help="Held-out data; else a tenth is held out.")]
Epochs = Annotated[int | None, typer.Option("--epochs", min=1, max=50)]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, max=256, help="Examples of one step.")]
Multiplier = Annotated[float | None, typer.Option("--learning-rate-multiplier", min=0)]
Rank = Annotated[int | None, typer.Option("--rank", min=1)]
Steps = Annotated[int | None, typer.Option("--max-steps", min=1)]
Seed = Annotated[int, typer.Option("--seed", min=0)]
Dpo = Annotated[bool, typer.Option("--dpo", help="The file holds preference rows.")]


def register(app: typer.Typer) -> None:
    app.command()(train)


@with_settings()
def train(
    loaded: LoadedSettings,
    file: File,
    out: Out = Path("adapter"),
    validation: Validation = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    learning_rate_multiplier: Multiplier = None,
    rank: Rank = None,
    max_steps: Steps = None,
    seed: Seed = 0,
    dpo: Dpo = False,
) -> None:
    """Train one adapter on FILE with the server's own trainer; `lodger adapters push` then publishes it.

    Everything that is left out is chosen as a job's "auto" is. Uses a queue and a store of its own.
    """
    from app.training.dataset_rows import Method
    from app.training.fine_tuning import JobRequest
    from app.training.spec import Hyperparameters, LoraOptions, TrainingOptions
    from app.worker import build_worker

    with tempfile.TemporaryDirectory(prefix="lodger-train-") as name:
        directory = Path(name)
        own = {"store": (directory / "store").as_uri(), "database_url": f"sqlite:///{directory / 'jobs.db'}"}
        worker = build_worker(loaded.settings.model_copy(update=own))
        request = JobRequest(
            model=worker.parts.base.spec.id,
            training_file=_add(worker, file),
            validation_file=None if validation is None else _add(worker, validation),
            asked={"file": str(file)},
            method=Method.DPO if dpo else Method.SUPERVISED,
            seed=seed,
            hyperparameters=Hyperparameters(epochs, batch_size, learning_rate_multiplier),
            lora=LoraOptions(rank=rank),
            training=TrainingOptions(max_steps=max_steps),
        )
        job = worker.training.fine_tuning.create(TENANT, request)
        worker.start()
        try:
            job = _follow(worker, job)
            if job.error is not None:
                say(f"lodger: {job.error.code}: {job.error.message}")
                sys.exit(1)
            _keep(worker, job, out)
        finally:
            worker.close()


def _add(worker: Worker, path: Path) -> str:
    from app.training.files import NewFile

    return worker.training.fine_tuning.files.add(TENANT, NewFile(path.name), path).id


def _follow(worker: Worker, job: Job) -> Job:
    """Show a bar until the job is over."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from app.training.config import lora_parameters

    jobs, is_told = worker.training.fine_tuning.jobs, False
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("validating", total=None)
        while not job.status.is_over:
            time.sleep(POLL_S)
            job = jobs.get(TENANT, job.id)
            config = job.config
            if config is not None and not is_told:
                is_told = True
                base = worker.parts.base.spec
                trained = lora_parameters(base, config.rank, config.target_modules)
                total = sum(i * o for i, o in base.linears.values())
                say(f"{trained:,} trainable parameters ({trained / total:.2%} of the linears), rank {config.rank}")
                say(f"{config.total_steps} steps of {config.batch_size} examples, rate {config.learning_rate:.2g}")
            bar.update(task, completed=job.step, total=job.total_steps, description=_told(jobs.metrics(job.id)))
    return job


def _told(metrics: Metrics) -> str:
    """The newest losses."""
    train = next((v["train_loss"] for _, v in reversed(metrics) if "train_loss" in v), None)
    valid = next((v["full_valid_loss"] for _, v in reversed(metrics) if "full_valid_loss" in v), None)
    told = [f"loss {train:.3f}"] if train is not None else ["starting"]
    return ", ".join(told + ([f"held-out {valid:.3f}"] if valid is not None else []))


def _keep(worker: Worker, job: Job, out: Path) -> None:
    """Copy the adapter out of the job's own store, and write what was measured."""
    from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE, blob_key
    from app.training.jobs import result_csv

    out.mkdir(parents=True, exist_ok=True)
    (manifest,) = worker.parts.catalog.versions(TENANT, job.adapter_name)
    for fact, name in ((manifest.config, CONFIG_FILE), (manifest.weights, WEIGHTS_FILE)):
        worker.parts.store.download(blob_key(TENANT, fact.sha256), out / name, max_bytes=fact.num_bytes)
    metrics = worker.training.fine_tuning.jobs.metrics(job.id)
    (out / "metrics.csv").write_bytes(result_csv(metrics))
    gate = job.gate or {}
    if "base_loss" in gate and "loss" in gate:
        say(f"held-out loss {gate['base_loss']:.4f} -> {gate['loss']:.4f}")
    if not gate.get("passed"):
        say(f"warning: a server would not have moved the alias: {gate.get('reason')}")
    if _plot(metrics, gate.get("base_loss"), out / "loss.png"):
        say(f"plot: {out / 'loss.png'}")
    print(out)


def _plot(metrics: Metrics, base_loss: float | None, path: Path) -> bool:
    """Losses by step as PNG; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        say("no plot: matplotlib is not installed")
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key, label, style in (("train_loss", "training", "-"), ("full_valid_loss", "held-out", "o-")):
        points = [(step, values[key]) for step, values in metrics if key in values]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1)
    if base_loss is not None:
        axes.axhline(base_loss, linestyle="--", color="grey", linewidth=1, label="held-out, base")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per label token)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
