"""The training loop of one run: resume, step, log, evaluate, checkpoint, export."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.filesize import decimal

from jaxmoe.config import RunConfig
from jaxmoe.errors import UserError, listed, out_of_memory, shortened
from jaxmoe.files import why_unusable
from jaxmoe.interop.export_plan import LEFT_OUT
from jaxmoe.interop.source import check_copies
from jaxmoe.model.batch import Batch, learning_batch
from jaxmoe.model.sampling import generate
from jaxmoe.parallel import processes
from jaxmoe.parallel.sharding import batch_sharding, make_mesh
from jaxmoe.params import count
from jaxmoe.run import memory
from jaxmoe.run.assemble import Assembled, assemble
from jaxmoe.run.checkpoints import Checkpoints, steps_in
from jaxmoe.run.data import RunData, open_data
from jaxmoe.run.display import RunDisplay, show_table
from jaxmoe.run.exporting import export, exports, holds
from jaxmoe.run.folder import RunFolder, RunLayout
from jaxmoe.run.meter import Meter
from jaxmoe.run.programs import Programs
from jaxmoe.training.balance import router_metrics
from jaxmoe.training.state import Saved, TrainState, checksum, not_finite
from jaxmoe.training.step import TrainStep

_FINISH_SECONDS = 60.0
"""How long an interrupted run waits for the checkpoint that is being written; a second signal ends it at once."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run reports.

    Attributes:
        loss: of the last logged step, nats per token.
        evaluation: the last metrics of held-out data, by name; none without evaluation.
        baselines: bits per byte of a unigram and a bigram model of bytes on the same text.
        export: the exported folder, None if the run exports nothing.
    """

    loss: float
    evaluation: dict[str, float]
    baselines: dict[str, float]
    export: Path | None


def run(config: RunConfig) -> Result:
    """Run, or go on with, one training run.

    Everything that can be wrong with the model, the data or the mesh is found before the run's folder is made.

    Raises:
        UserError: anything that the user can mend; nothing half-written is left behind.
    """
    _check_devices()
    assembled = processes.agree(lambda: _assemble(config))
    meter = Meter(assembled)  # before anything competes with what it measures
    with Programs(assembled) as programs:
        if _steps_done(config) < config.train.steps:
            programs.begin()
        data = processes.agree(lambda: _open_data(assembled))
        with RunFolder.open(config) as folder, jax.set_mesh(assembled.mesh):
            data.keep()
            with contextlib.closing(data):
                return Trainer(assembled, folder, data, programs, meter).run()


def _check_devices() -> None:
    """jax looks for devices when first asked, and then does not say in one line that there are none."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        wanted = os.environ.get("JAX_PLATFORMS")
        if wanted is None:
            raise
        told = shortened(" ".join(str(error).split())) or "no device of that kind was found"
        raise UserError(
            f"the environment has JAX_PLATFORMS = {wanted!r} and the installed jax {jax.__version__} cannot use "
            f"it ({told}): unset JAX_PLATFORMS, or for NVIDIA GPUs install jaxmoe[cuda13]"
        ) from error


def _assemble(config: RunConfig) -> Assembled:
    """The model on its devices, with all that can be checked of them before anything is compiled."""
    if bad := why_unusable(config.output_dir):
        raise UserError(f"output_dir: {bad}; give another one")
    mesh = make_mesh(**config.mesh.model_dump())
    if jax.local_device_count() % config.mesh.tensor:
        raise UserError(
            f"mesh.tensor = {config.mesh.tensor} does not divide the {jax.local_device_count()} devices of a process: "
            "tensor parallelism must stay within a process"
        )
    assembled = assemble(config, mesh)
    origin = assembled.source.folder
    if origin is not None and Path(config.output_dir).resolve().is_relative_to(origin.resolve()):
        raise UserError(
            f"output_dir: {config.output_dir} lies inside the model's folder {origin}, all of which is "
            "exported; choose a folder outside of it"
        )
    memory.check_before_compiling(assembled)
    check_copies(assembled.source)
    return assembled


def _open_data(assembled: Assembled) -> RunData:
    """All that can be checked of the data while nothing has been written yet."""
    data = open_data(assembled.config, assembled.source.folder, assembled.spec.vocab_size)
    _ = data.evaluations  # they may have nothing to predict, and are read only here
    _ = data.told
    return data


def _steps_done(config: RunConfig) -> int:
    """Those of the newest checkpoint, if the folder is this run's and can be read: that is checked later."""

    def find() -> int:
        with contextlib.suppress(OSError):
            return max(steps_in(RunLayout(Path(config.output_dir)).checkpoints), default=0)
        return 0

    return processes.first(find)


class Trainer:
    """One run in progress."""

    def __init__(
        self, assembled: Assembled, folder: RunFolder, data: RunData, programs: Programs, meter: Meter
    ) -> None:
        self.assembled = assembled
        self.config = assembled.config
        self.folder = folder
        self.data = data
        self.programs = programs
        self.meter = meter
        self.checkpoints = Checkpoints(folder.layout.checkpoints, self.config.train.keep_checkpoints)
        self._frozen: int | None = None

    def run(self) -> Result:
        """Train to the last step, then export and sample."""
        batches = processes.agree(self.data.training_batches)
        steps, done = self.config.train.steps, self.checkpoints.latest() or 0
        try:
            with RunDisplay(steps, done, quiet=jax.process_index() != 0) as display:
                display.say(self._headline(done))
                for line in self.data.told[1:]:
                    display.say(line)
                for doubt in self.data.doubts(self.assembled.source.raw):
                    display.say(f"warning: {doubt}")
                if not done:  # in the time that the step still takes
                    processes.agree(self.assembled.initial_weights.compile)
                step = self._compiled() if done < steps else None
                state = self._start(batches)
                if step is not None:
                    state = self._train(step, state, batches, display)
        except BaseException as error:
            with contextlib.suppress(Exception):  # the first error is the one to report
                if isinstance(error, UserError):
                    self.checkpoints.close()
                # A process that was interrupted, or has a fault, may be alone with that and must not wait for others.
                elif jax.process_count() == 1:
                    self.checkpoints.close_within(_FINISH_SECONDS)
            if (told := out_of_memory(error)) is not None:
                lower = memory.remedy(self.assembled, begun=self.folder.layout.holds_run())
                raise UserError(f"{told}: {lower}") from error
            raise
        self.checkpoints.close()
        return self._finish(state)

    def _compiled(self) -> TrainStep:
        """The training step, of which it is known now that it fits."""
        step = processes.agree(self.programs.train_step)
        processes.agree(lambda: memory.check_compiled(self.assembled, step.function))
        return step

    def _start(self, batches: Any) -> TrainState:
        """The newest checkpoint, or the state before the first step."""
        assembled = self.assembled
        latest = self.checkpoints.latest()
        self.folder.truncate_metrics(latest or 0)
        if latest is None:
            weights = processes.agree(assembled.initial_weights.make)
            state = assembled.begin(weights)
            # Of drawn ones the first step tells.
            if assembled.source.folder is not None and (bad := not_finite(state)):
                raise UserError(
                    f"{assembled.source.folder}: found nan or infinity in {listed(bad, 5)}, "
                    "expected finite weights: give a checkpoint without them"
                )
            self._frozen = checksum(state.frozen)
            return state
        saved, extra = self.checkpoints.restore(latest, assembled.state.saved)
        positions = extra["data"]
        if len(positions) != jax.process_count():
            raise UserError(
                f"{self.folder.path}: the run was made by {len(positions)} processes and now has "
                f"{jax.process_count()}: start it with as many as before, or export it and begin another run"
            )
        processes.agree(lambda: batches.set_state(positions[jax.process_index()]))
        assembled.check_adapter(extra.get("adapter"))
        frozen = processes.agree(assembled.frozen_weights)
        assembled.check_frozen(frozen, extra.get("frozen"))
        self._frozen = extra.get("frozen")
        return assembled.state._replace(frozen=frozen).restored(Saved(*saved))

    def _train(self, step: TrainStep, state: TrainState, batches: Any, display: RunDisplay) -> TrainState:
        train, done = self.config.train, int(state.step)
        self.meter.restart()
        batch = self._next(batches)
        for number in range(done + 1, train.steps + 1):
            state, metrics = step(state, batch)
            position = batches.get_state()
            if number < train.steps:  # the next batch is made while the devices compute
                batch = self._next(batches)
            figures = self.meter.after(metrics)
            self._report(number, number == done + 1, metrics, figures, display)
            last = number == train.steps
            saves = last or number % train.checkpoint_every == 0
            if saves and (bad := not_finite(state)):
                raise self._diverged(f"step {number} left nan or infinity in {listed(bad, 5)}")
            if self.data.evaluations and (last or (train.eval_every and number % train.eval_every == 0)):
                self._evaluate(number, state, display)
            if saves:
                extra = {"data": processes.gather(position), "frozen": self._frozen}
                if self.assembled.adapted is not None:
                    extra["adapter"] = self.assembled.adapted.fingerprint
                self.checkpoints.save(number, state.saved, extra)
            self.meter.restart()
        return state

    def _report(
        self,
        number: int,
        first: bool,
        metrics: dict[str, Any],
        figures: dict[str, float],
        display: RunDisplay,
    ) -> None:
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            found = f"step {number} has loss {loss} and gradient norm {norm}"
            if number == 1:  # the learning rate has not acted yet
                raise UserError(
                    f"{found} before anything was trained: the weights or their activations exceed what "
                    f"{self.assembled.dtype} holds: set model.dtype=float32, or give another checkpoint"
                )
            raise self._diverged(found)
        if not float(metrics["targets"]):
            raise UserError(
                f"data: none of the {self.config.train.batch_size} sequences of step {number} has a token to "
                "predict, expected documents of two tokens or more: give longer documents, or a tokenizer that "
                "has an end-of-text token"
            )
        line = f"loss {loss:.4f}  {figures['tokens_per_second']:,.0f} tokens/s  MFU {figures['mfu']:.1%}"
        display.step(number, line)
        if first:
            display.say(
                f"first step after {time.perf_counter() - self.programs.begun:.1f} s, compiling included"
            )
        if first or number % self.config.train.log_every == 0 or number == self.config.train.steps:
            display.logged(number, line)
            scalars = {name: float(value) for name, value in metrics.items() if name != "router"}
            router = router_metrics(metrics["router"]) if "router" in metrics else {}
            self.folder.append({"step": number} | scalars | figures | router)

    def _diverged(self, found: str) -> UserError:
        self.checkpoints.wait()
        latest = self.checkpoints.latest()
        kept = "no step" if latest is None else f"step {latest}"
        return UserError(
            f"training diverged: {found}; lower optimizer.learning_rate or raise optimizer.warmup_steps, in a "
            f"new output_dir ({kept} is checkpointed)"
        )

    def _evaluate(self, number: int, state: TrainState, display: RunDisplay) -> None:
        """Log how well held-out data is predicted."""
        figures: dict[str, float] = {}
        for evaluation in self.data.evaluations:
            nats = 0.0
            for batch in evaluation.batches:
                micro = jax.tree.map(lambda x: x[0], self._to_devices(batch, 1))
                nats += float(self.assembled.eval_step(state.params, micro))
            figures |= evaluation.figures(nats)
        told = ", ".join(f"{_held_out_name(name)} {value:.4f}" for name, value in figures.items())
        display.say(f"step {number}: {told}")
        self.folder.append({"step": number} | figures)
        if self.config.sample is not None and self.config.sample.prompts:
            for text in self._samples(state).values():
                display.say(f"step {number}: {text}")

    def _next(self, batches: Any) -> Batch:
        """The next batch on the devices; a process may find a document that it cannot read."""
        with self.meter.reading():
            rows = processes.agree(lambda: next(batches))
        return self._to_devices(rows, self.config.train.accumulation)

    def _to_devices(self, rows: dict[str, np.ndarray], count: int) -> Batch:
        """This process's rows (B, T) → micro-batches (count, B / count, T), sharded over all processes."""

        def place(array: np.ndarray) -> jax.Array:
            split = array.reshape(count, -1, *array.shape[1:])
            return jax.make_array_from_process_local_data(
                batch_sharding(self.assembled.mesh, leading=1), split
            )

        return jax.tree.map(place, learning_batch(**rows))

    def _finish(self, state: TrainState) -> Result:
        config = self.config
        rows: dict[str, str] = {}
        result = Result(_last(self.folder, "loss"), {}, {}, None)
        rows["training loss"] = f"{result.loss:.4f} nats per token"
        if self.data.evaluations:
            names = [name for evaluation in self.data.evaluations for name in evaluation.figures(0.0)]
            figures = {name: _last(self.folder, name) for name in names}
            baselines = processes.first(self.data.baselines)
            result = dataclasses.replace(result, evaluation=figures, baselines=baselines)
            rows |= {_held_out_name(name): f"{value:.4f}" for name, value in figures.items()}
            rows |= {f"  a {name} model of bytes": f"{value:.4f}" for name, value in baselines.items()}
        if config.train.export:
            result = dataclasses.replace(result, export=self.folder.layout.export)
            rows |= self._export(state)
        rows |= self._samples(state)
        if jax.process_index() == 0:
            show_table(f"{self.folder.path}: {config.train.steps} steps done", rows)
        return result

    def _samples(self, state: TrainState) -> dict[str, str]:
        """What the model makes of each prompt, by the name of its row in a table."""
        sample = self.config.sample
        if sample is None:
            return {}
        prompts = sample.prompts or (sample.prompt or "",)
        made = {}
        for number, prompt in enumerate(prompts, 1):
            ids = self.data.prompt(prompt) or list(self.data.stops[:1]) or [0]
            found = generate(
                state.params,
                self.assembled.spec,
                ids,
                stop=self.data.stops,
                dtype=self.assembled.dtype,
                device=self.assembled.device,
                **sample.model_dump(include={"tokens", "temperature", "seed"}),
            )
            answer = self.data.tokenizer.decode(found)
            name = "sample" if len(prompts) == 1 else f"sample {number}"
            made[name] = f"{prompt}\n> {answer}" if sample.chat else prompt + answer
        return made

    def _export(self, state: TrainState) -> dict[str, str]:
        """Write what ``train.export`` asks for and is not there yet; returns what to tell of it."""
        layout, rows = self.folder.layout, {}
        left_out: list[str] = []
        for what, folder in exports(self.config, layout).items():
            rows["export" if folder == layout.export else "merged"] = str(folder)
            if not processes.first(functools.partial(holds, what, folder)):
                left_out += export(self.assembled, state, what, folder)
        if left_out:
            rows["not exported"] = f"{listed(left_out, 20)}: {LEFT_OUT}"
        return rows

    def _headline(self, done: int) -> str:
        spec, state, meter = self.assembled.spec, self.assembled.state, self.meter
        trained = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
        of_these = "" if trained == count(spec.declared) else f" ({trained:,} trained)"
        if self.assembled.adapted is not None:
            of_these = f" ({self.assembled.adapted.told()})"
        sizes = ", ".join(
            f"{decimal(size)} of {kind}" for kind, size in memory.held_bytes(self.assembled).items()
        )
        each = " on each device" if self.assembled.mesh.size > 1 else ""
        return (
            f"{self.folder.path}: {f'resuming after step {done}' if done else 'starting'}, "
            f"{len(spec.layers)} layers, {count(spec.declared):,} parameters{of_these}, {sizes}{each}, "
            f"{self.data.told[0]}; MFU against {meter.peak / 1e12:.4g} TFLOP/s per device "
            f"({meter.peak_origin})"
        )


def _held_out_name(metric: str) -> str:
    """What a metric of held-out data is called in tables: eval/tools/loss is held-out tools loss."""
    return metric.replace("eval/", "held-out ", 1).replace("/", " ").replace("_", " ")


def _last(folder: RunFolder, name: str) -> float:
    """The last logged value of a metric; nan where there is none."""

    def find() -> float:
        if not folder.layout.metrics.exists():
            return math.nan
        records = [
            json.loads(line) for line in folder.layout.metrics.read_text(encoding="utf-8").splitlines()
        ]
        return next((float(record[name]) for record in reversed(records) if name in record), math.nan)

    return processes.first(find)
