"""The training loop: one step after another, and a state that can be put down at any step and taken up to the bit.

    for every epoch:    the people in a new order, shown in one view (how each is turned, zoomed, mirrored, coloured)
      for every step:   batch -> network, teacher -> terms of the loss -> gradients -> optimisers -> running mean
      at times:         score the running mean on the validation people, keep the best

Order and views are functions of (seed, epoch) alone, and nothing in the loop draws a random number: the state of a run is its
weights, its optimisers and how far it has come.
"""

import json
import math
import os
import signal
import time
from dataclasses import asdict, dataclass, field

import torch
from tqdm import tqdm

import checkpoint
from augmentation import AUGMENTATIONS
from crops import make_batch, place
from distill import WEIGHTS, distillation_loss, of_a_part, task_loss, total
from evaluate import evaluate
from inputs import BadInput, has_room
from recipe import SCORE_EVERY, average, build_optimisers, generator, rate_share

SAVE_EVERY = 300         # seconds between two checkpoints within an epoch
CHUNK = 1024             # crops that go to a GPU at once
BEGAN = time.monotonic() # when this process did: --stop-after counts from here, not from the first step

# What a run that goes on must have in common with the one that was stopped, or it would be neither. Epochs may be added or
# taken off, the decay then follows the new number; the rate may be lowered, where it was too high.
SETTINGS = ("distill", "terms", "augmentation", "views", "batch_size", "accumulate", "optimiser", "seed", "amp", "compile",
            "deterministic")


@dataclass
class Progress:
    epoch: int = 0                               # epochs that are through
    step: int = 0                                # steps of the next one that are through
    sums: dict = field(default_factory=dict)     # of the terms of the loss, over these steps
    seconds: float = 0                           # that these steps took
    best: float = -1                             # PCKh@0.5


def resident(crops, device):
    """Stored crops, on the GPU where there is room for them: no step waits for the bus."""
    if device == "cpu" or not has_room(device, crops.nbytes):
        return crops
    there = torch.empty(crops.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(crops), CHUNK):
        there[start:start + CHUNK] = torch.from_numpy(crops[start:start + CHUNK].copy())    # what is mapped is read-only
    return there


def rounded(rate):
    """Pictures a second, as a log says them: 237, 7.31."""
    return round(rate) if rate >= 10 else round(rate, 2)


class Stopped(Exception):
    """Somebody asked the run to end: its state is saved."""


class Training:
    """A network on its way. people, crops: to learn from. lessons: distill.Lessons, or None without a teacher."""

    def __init__(self, args, team, model, averaged, people, crops, valid, valid_crops, lessons):
        self.args, self.team, self.model, self.averaged = args, team, model, averaged
        self.people, self.crops, self.valid, self.valid_crops = people, resident(crops, team.device), valid, valid_crops
        self.lessons, self.augmentation = lessons, AUGMENTATIONS[args.augmentation]
        self.parallel = team.wrap(model)
        self.optimisers = build_optimisers(model, args.optimiser, args.lr)
        self.highest = [optimiser.param_groups[0]["lr"] for optimiser in self.optimisers]
        self.people_a_step = args.batch_size * args.accumulate * team.world
        self.per_epoch = max(1, len(people) // self.people_a_step)         # what is left over comes in another epoch
        self.progress = Progress()
        # who is learned from, wherever the files are
        labels = [torch.from_numpy(of) for of in (people.joints, people.visible, people.center, people.side)]
        self.who = f"{len(people)} of {people.name}, {checkpoint.checksum(labels)[:16]}"
        self.asked_to_stop = None
        self.saved_at = time.monotonic()

    # --------------------------------------------------------------------------- one step

    def loss(self, batch, view, rows, seen):
        """-> {term: value} of a part of a step, 'loss' the weighted sum.

        seen: visible joints of the step's average part; 0 where this part is the whole step.
        """
        with torch.autocast(torch.device(self.team.device).type, torch.bfloat16, enabled=self.args.amp):
            output = self.parallel(batch.images)
        lesson = self.lessons(batch.images, view, rows) if self.lessons else None      # whose precision is its own affair
        if lesson:
            terms = distillation_loss(self.model.head, output, lesson, batch.xy, batch.visible)
            weights = {name: WEIGHTS[self.args.student][name] for name in self.args.terms}
        else:
            terms, weights = {"task": task_loss(self.model.head, output.prediction, batch.xy, batch.visible)}, {}
        terms = of_a_part(terms, batch.visible.sum() / seen if seen else 1)
        return {**terms, "loss": total(terms, weights)}

    def step(self, number, rows, view, variation):
        """Learn from people `rows` -> {term: its mean over them}. number: of this step in the whole training."""
        team, parts = self.team, rows.view(self.args.accumulate, self.team.world, self.args.batch_size)
        for optimiser, rate in zip(self.optimisers, self.highest):
            optimiser.param_groups[0]["lr"] = rate * rate_share(number, self.args.epochs * self.per_epoch)
            optimiser.zero_grad()
        count, seen = parts[..., 0].numel(), 0
        if count > 1:
            seen = place(self.people, rows, self.model.size, variation).visible.sum().item() / count
        values = 0
        for a, mine in enumerate(parts[:, team.rank]):
            batch = make_batch(self.people, self.crops, mine, self.model.size, team.device, variation)
            with team.silent(self.parallel, unless=a + 1 == self.args.accumulate):
                terms = self.loss(batch, view, mine, seen)
                (terms["loss"] / self.args.accumulate).backward()
            values = values + torch.stack([term.detach() for term in terms.values()]) / self.args.accumulate
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        size = torch.stack(torch._foreach_norm(gradients)).norm()
        *values, size = torch.cat([team.mean(values), size[None]]).tolist()      # here a step waits for the device
        terms = dict(zip(terms, values))
        if not all(map(math.isfinite, (*values, size))):
            self.give_up(terms, size, rows)
        for optimiser in self.optimisers:
            optimiser.step()
        average(self.averaged, self.model, number, self.args.epochs * self.per_epoch)
        return terms

    def give_up(self, terms, size, rows):
        """A loss or gradient that is not finite ends the run before it spoils the weights; the batch is kept."""
        file, done = self.args.out / "not-finite.pt", self.progress
        named = [name for name, value in terms.items() if not math.isfinite(value)] or ["gradient"]
        if self.team.leads:
            torch.save(dict(rows=rows, epoch=done.epoch, step=done.step, terms=terms, gradient=size, settings=self.settings(),
                            model=self.model.state_dict()), file)
        raise BadInput(f"not finite at epoch {done.epoch + 1}, step {done.step + 1}: {', '.join(named)} ({file} holds the "
                       f"weights and the people of this batch). Nothing was learned from it: look at these people, or lower "
                       "--lr" + (" and go on with --resume" if (self.args.out / "last.pt").exists() else ""))

    # --------------------------------------------------------------------------- one epoch

    def run(self):
        """Until the last epoch, or until Stopped."""
        handlers = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with open(self.args.out / "log.jsonl", "a" if self.progress.epoch else "w") as log:
                while self.progress.epoch < self.args.epochs:
                    self.epoch(log)
            # no epoch of this run was one that is scored; the first process knows, the others may look before it has written
            if self.team.any(self.team.leads and not (self.args.out / "best.pt").exists()):
                self.score()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def on_signal(self, number, frame):
        self.asked_to_stop = number
        signal.signal(number, signal.SIG_DFL)                # a second one ends at once

    def epoch(self, log):
        args, done, team = self.args, self.progress, self.team
        view = done.epoch % args.views if args.views else done.epoch
        variation = self.augmentation.draw(len(self.people), generator(args.seed, 1, view))
        order = torch.randperm(len(self.people), generator=generator(args.seed, 2, done.epoch))
        if self.lessons:
            self.lessons.prepare(view, lambda rows: make_batch(self.people, self.crops, rows, self.model.size, team.device,
                                                               variation).images, self.stop_or_save)
        input_rate = self.input_rate(order[:self.args.batch_size], variation)
        self.model.train()
        began = time.monotonic() - done.seconds
        bar = tqdm(total=self.per_epoch * self.people_a_step, initial=done.step * self.people_a_step, unit=" images",
                   desc=f"epoch {done.epoch + 1}/{args.epochs}", leave=False, disable=None if team.leads else True)
        with bar:
            while done.step < self.per_epoch:
                rows = order[done.step * self.people_a_step:(done.step + 1) * self.people_a_step].sort().values
                terms = self.step(done.epoch * self.per_epoch + done.step, rows, view, variation)
                done.sums = {name: done.sums.get(name, 0) + term for name, term in terms.items()}
                done.step, done.seconds = done.step + 1, time.monotonic() - began
                bar.set_postfix({name: f"{value / done.step:.3g}" for name, value in done.sums.items()}, refresh=False)
                bar.update(len(rows))
                self.stop_or_save(between_steps=True)
        self.close_epoch(log, input_rate)

    def input_rate(self, rows, variation):
        """Pictures a second of the input side alone, of one batch: what a training step cannot be faster than."""
        wait = (lambda: None) if self.team.device == "cpu" else torch.cuda.synchronize
        for _ in range(2):                               # the first warms up
            wait()
            began = time.monotonic()
            make_batch(self.people, self.crops, rows, self.model.size, self.team.device, variation)
            wait()
        return self.team.world * len(rows) / (time.monotonic() - began)

    def close_epoch(self, log, input_rate):
        """Score, keep the best, log, save."""
        args, done = self.args, self.progress
        line = {"epoch": done.epoch + 1, "lr": self.optimisers[-1].param_groups[0]["lr"],
                **{name: value / self.per_epoch for name, value in done.sums.items()},
                "images_per_second": rounded(self.per_epoch * self.people_a_step / done.seconds),
                "input_alone": rounded(input_rate)}
        if (done.epoch + 1) % SCORE_EVERY[args.preset] == 0 or done.epoch + 1 == args.epochs:
            line |= self.score()
        print("  ".join(f"{name} {value}" if isinstance(value, int) else f"{name} {value:.4g}" for name, value in line.items()),
              flush=True)
        if self.team.leads:
            print(json.dumps(line), file=log, flush=True)
        self.progress = Progress(epoch=done.epoch + 1, best=done.best)
        self.save()

    def score(self):
        """Score the running mean, keep it where it is the best so far -> {'pckh@0.5': mean, 'pckh@0.1': mean}."""
        done = self.progress
        self.team.share_buffers(self.averaged)
        found = evaluate(self.averaged, self.valid, self.valid_crops, self.team.device, team=self.team,
                         between=self.stop_or_save)
        scores = {name: values["mean"] for name, values in found.items()}
        if scores["pckh@0.5"] > done.best:
            done.best = scores["pckh@0.5"]
            if self.team.leads:
                checkpoint.save(self.args.out / "best.pt", self.averaged,
                                self.facts(min(done.epoch + 1, self.args.epochs)) | scores)
        return scores

    # --------------------------------------------------------------------------- the state

    def settings(self):
        """SETTINGS, and what stands behind some of them: how many processes, which people, which teacher."""
        return {name: getattr(self.args, name) for name in SETTINGS} | {
            "processes": self.team.world, "people": self.who, "teacher": self.lessons and self.lessons.source}

    def facts(self, epoch):
        return dict(data=self.people.name, people=len(self.people), epoch=epoch, seed=self.args.seed)

    def stop_or_save(self, between_steps=False):
        """Stop where somebody asked; between steps also where time is up: then every slice of a run makes one step at least."""
        now = time.monotonic()
        late = between_steps and self.args.stop_after is not None and now - BEGAN > 60 * self.args.stop_after
        if self.team.any(bool(self.asked_to_stop) or late):
            self.save()
            raise Stopped
        if now - self.saved_at > SAVE_EVERY and self.team.leads:
            self.save()

    def save(self):
        """last.pt: all that a run needs to go on to the bit; the one before it becomes previous.pt."""
        self.saved_at = time.monotonic()
        if self.team.leads:
            training = dict(progress=asdict(self.progress), epochs=self.args.epochs, lr=self.args.lr, settings=self.settings(),
                            averaged=self.averaged.state_dict(),
                            optimisers=[optimiser.state_dict() for optimiser in self.optimisers])
            checkpoint.save(self.args.out / "last.pt", self.model, self.facts(self.progress.epoch), training,
                            keep=self.args.out / "previous.pt")

    def resume(self):
        """Put the state of last.pt (or of previous.pt, where that is damaged) into this run."""
        file, content = checkpoint.read_last(self.args.out)
        training = content["training"]
        if training is None:
            raise BadInput(f"{file} holds weights but no state of training: --resume needs the last.pt that train.py wrote")
        if content["config"] != self.model.config:
            raise BadInput(f"{file} is {checkpoint.describe(content['config'])}, not {checkpoint.describe(self.model.config)}: "
                           f"give the flags of the run that is to go on")
        present = self.settings()
        for name, value in training["settings"].items():
            if (now := present.get(name)) != value:
                raise BadInput(f"{file} was trained with {name} {value}, now it is {now}: "
                               f"give the flags of the run that is to go on")
        if self.args.lr > training.get("lr", self.args.lr):
            raise BadInput(f"{file} was trained with --lr {training['lr']}, now it is {self.args.lr}: it may be lowered, "
                           f"not raised")
        if (epochs := training.get("epochs", self.args.epochs)) != self.args.epochs:
            print(f"{file} was to have {epochs} epochs, now it is {self.args.epochs}: "
                  f"its rate falls at other steps than until now")
        self.model.load_state_dict(content["model"])
        self.averaged.load_state_dict(training["averaged"])
        for optimiser, state in zip(self.optimisers, training["optimisers"]):
            optimiser.load_state_dict(state)
        self.progress = Progress(**training["progress"])
        if not (self.args.out / "best.pt").exists():     # left behind on another machine: what comes is the best there is
            self.progress.best = -1
        log = self.args.out / "log.jsonl"                # a kill may have come between the log's line and the checkpoint
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        if self.team.leads and len(lines) > self.progress.epoch:
            shorter = log.with_suffix(".partial")
            shorter.write_text("".join(lines[:self.progress.epoch]))
            os.replace(shorter, log)
        return file
