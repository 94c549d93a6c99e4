"""The experiment, top to bottom: `python -m train.main --arch=vgg16`."""

import collections
import contextlib
import functools
import math
import pathlib
import sys
from collections.abc import Sequence

import jax

from flaxcnn import model_folder
from flaxcnn.accounting import summarize
from flaxcnn.errors import InputError
from flaxcnn.predict import Classifier
from train import (
    advice,
    comparison,
    compiled,
    cpu,
    data,
    features,
    metrics,
    optim,
    state,
    steps,
    transfer,
)
from train.checkpoint import Checkpoints, require_finite
from train.comparison import Outcome
from train.config import Config, load_dataset, make_plan, parse
from train.errors import DivergedError, UsageError
from train.kept_config import keep_config
from train.processes import Interrupts, join_cluster


def main(config: Config) -> Outcome:
    """Trains as `config` says."""
    join_cluster(config.coordinator_address, config.num_processes, config.process_id)
    with contextlib.ExitStack() as stack:
        # ------------------------------------------------------------------------- devices, data
        # Signals are noted from here on: JAX swallows an exception raised in its callbacks. Not
        # before, as in a cluster JAX takes SIGTERM over when it is joined.
        interrupts = stack.enter_context(Interrupts())
        compiled.keep_programs()
        devices = jax.device_count()
        writes = jax.process_index() == 0
        say = print if writes else lambda line: None
        dataset = load_dataset(config)
        for note in dataset.notes:
            say(note)
        if interrupts.told_alone():
            return _untrained(interrupts)
        accelerated = jax.default_backend() != "cpu"
        plan = make_plan(config, dataset, devices, accelerated)
        steps.multiply_in(plan.precision)
        prepared = transfer.preparation(plan.arch, plan.weights) if plan.weights else None
        transform = data.evaluation_transform(plan, dataset.mean_and_std, prepared)
        steps_per_epoch = plan.train_examples / plan.batch_size
        eval_every = config.eval_every or max(round(steps_per_epoch), 100)
        log_every = config.log_every or min(max(round(steps_per_epoch / 10), 10), 100)

        # ---------------------------------------------------------------------- model, optimiser
        start = transfer.load(plan)
        if interrupts.told_alone():
            return _untrained(interrupts)
        model = state.create_model(plan, devices, **(start.arguments if start else {}))
        split = transfer.split(model, plan)
        learning_rate = optim.learning_rate_schedule(plan)
        optimiser = split.scaled(optim.optimiser(plan, learning_rate))
        create = functools.partial(state.create_state, model, plan, optimiser, split)
        shapes = jax.eval_shape(create)
        examples: data.Images | features.Features
        if start and features.suffice(plan):
            begin = jax.device_get(start.variables)  # the state's own are donated
            examples = features.Features(
                model, split, begin, dataset, plan, transform, config.read_threads
            )
        else:
            examples = data.Images(model, dataset, plan, transform, config.read_threads)
        classifier, mean_and_std = examples.classifier, examples.mean_and_std
        train_step = steps.train_over_devices(
            steps.make_train_step(classifier, optimiser, plan, mean_and_std, log_every, split)
        )
        eval_step = steps.evaluate_over_devices(steps.make_eval_step(classifier, mean_and_std))
        parameters, trained = (
            sum(leaf.size for leaf in jax.tree.leaves(tree))
            for tree in (shapes.params, split.trained(shapes.params))
        )
        macs = summarize(model, image_size=plan.image_size, in_channels=plan.channels).macs
        for line in metrics.header(plan, parameters, trained, macs, config.workdir):
            say(line)

        # ------------------------------------------------------------------------------- restore
        current = checkpoints = None
        best = -1.0
        if config.workdir:
            checkpoints = stack.enter_context(Checkpoints(config.workdir, plan))
            current, best = checkpoints.restore(shapes), checkpoints.best_top1
            if writes:
                keep_config(config, config.workdir)
        if current is None and start:
            first = state.state_of(start.variables, plan, optimiser, split)
            current = jax.device_put(first, steps.replicated())
        elif current is None:
            current = steps.begin(create)
        first_step = int(current.step)
        if first_step:
            say(f"resumed after step {first_step}")
        results = metrics.results_at(first_step, config.workdir)
        write = stack.enter_context(metrics.run_log(config.workdir if writes else None, first_step))
        progress = stack.enter_context(metrics.Progress(first_step, plan.steps, shown=writes))
        clock = metrics.Clock()
        folder = pathlib.Path(config.workdir, "model") if config.workdir else None

        def evaluate(step: int, current: state.TrainState) -> dict[str, float] | None:
            with clock.paused(current):
                shares = steps.on_devices(examples.test_batches())
                found = steps.evaluate(eval_step, current.evaluated, shares, told=interrupts.noted)
            if found is not None:
                record = {"split": "test", "step": step, **found}
                progress.test(record)
                write(record)
            return found

        def keep_if_best(current: state.TrainState) -> bool:
            """Writes the model folder, before the checkpoint says that this is the best.

            So a run that is killed between the two finds the same again, and writes the same.
            """
            nonlocal best
            if results is None:
                return False
            is_best, best = results["top1"] > best, max(best, results["top1"])
            if is_best:
                require_finite(current)
            if folder and writes and (is_best or not model_folder.is_one(folder)):
                with clock.paused(current):
                    portable = Classifier(model, current.evaluated, transform, dataset.class_names)
                    model_folder.save(folder, portable.as_folder(plan.arch))
            return is_best

        # ---------------------------------------------------------------------------------- loop
        batches = steps.on_devices(examples.training_batches(first_step))
        if interrupts.told_alone():
            return _untrained(interrupts)
        in_flight: collections.deque[jax.Array] = collections.deque()
        step, stop = first_step, False
        is_due = first_step > 0 and (first_step % eval_every == 0 or first_step == plan.steps)
        if is_due and results is None:  # the run was stopped while it evaluated
            results = evaluate(first_step, current)
            stop = results is None
        keep_if_best(current)
        while step < plan.steps and not stop:
            step += 1
            last = step == plan.steps
            with clock.waiting_for_data():
                batch = next(batches)
            batch["stop"] = steps.told_to_stop(interrupts.noted())
            # Once compiled, a step has nothing to send to the host or to get from it.
            with jax.transfer_guard("disallow" if step > first_step + 1 else "allow"):
                current, result = train_step(current, batch)
            in_flight.append(result["stop"])
            if len(in_flight) > 2:  # more of them can hang in the all-reduce of host devices
                stop = bool(jax.device_get(in_flight.popleft()))
            if step == first_step + 1:
                jax.block_until_ready(current)
                progress.say(f"first step, compilation included: {clock.seconds:.1f} s")
                if (
                    step % log_every and not last
                ):  # a log line of this step alone has to have its time
                    clock.restart()
            progress.advance()

            if step % log_every == 0 or last:
                record = metrics.train_record(current, plan, float(learning_rate(step - 1)), clock)
                progress.train(record)
                if not math.isfinite(record["loss"]):
                    raise DivergedError(
                        f"the loss is {record['loss']} after step {step}; lower --learning_rate "
                        f"(now {plan.learning_rate:g}) or bound the gradient, as --clip_norm=1"
                    )
                write(record)

            evaluated, is_best = step % eval_every == 0 or last, False
            if evaluated:
                results = evaluate(step, current)
                stop = stop or results is None
                is_best = keep_if_best(current)

            if checkpoints and (step % config.checkpoint_every == 0 or is_best or last or stop):
                with clock.paused(current):
                    checkpoints.save(current, results if evaluated else None)

    # ----------------------------------------------------------------------------------------- end
    if stop:
        after = f"stopped after step {step} of {plan.steps}; "
        say(after + ("the same command resumes" if checkpoints else "nothing saved: no --workdir"))
        return Outcome(interrupts.exit_code, None, trained, first_step > 0)
    if first_step == plan.steps:
        say("already trained to its last step; another --workdir starts afresh")
    if results is not None:
        say(f"test accuracy {results['top1']:.2%} on {results['n']} images")
    return Outcome(0, results, trained, resumed=first_step > 0)


def _untrained(interrupts: Interrupts) -> Outcome:
    print("stopped before a step was made; nothing was trained")
    return Outcome(interrupts.exit_code, None, trained=0, resumed=False)


def advise(config: Config) -> int:
    """Prints which transfer suits the data set, and runs it all to `--compare`; the exit code."""
    dataset = load_dataset(config)
    for note in dataset.notes:
        print(note)
    ways = advice.candidates(config, dataset, jax.device_count())
    print(advice.text(ways, dataset))
    return comparison.compare(ways, main, print) if config.compare else 0


def command(arguments: Sequence[str] | None = None) -> int:
    """The command line: what is wrong with it is told in one line."""
    try:
        config = parse(arguments)
        if not (config.suggest or config.compare):
            return main(config).exit_code
        return advise(config)
    except (InputError, UsageError) as error:
        print(f"python -m train.main: {error}", file=sys.stderr)
        return 2
    except DivergedError as error:
        print(f"python -m train.main: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    cpu.prepare()
    sys.exit(command())
