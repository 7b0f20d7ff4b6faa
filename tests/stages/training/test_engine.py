"""Check optimizer steps, learning rates, the best evaluation, batches, and resumed runs."""

import contextlib
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from data.streams import Stream
from pipeline.errors import Interrupted, TrainingStopped, UserError
from pipeline.stage import StopFlag
from pipeline.store.checkpoints import CheckpointStore
from stages.training import loop
from stages.training.batching import balanced, micro_batches, sorted_chunks
from stages.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from stages.training.loop import Task, fit
from stages.training.schedule import Schedule, learning_rate_at
from stages.training.selection import Best, Selection
from stages.training.session import Session
from stages.training.trainee import gradient_norm, make_trainee, optimizer_step

SHAPES = ("constant", "linear", "cosine", "cosine_with_min_lr")


def trainee_of(seed=0, max_grad_norm=1.0, learning_rate=0.1):
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 1).double()
    return make_trainee("model", model, learning_rate=learning_rate, max_grad_norm=max_grad_norm)


def weights(trainee):
    return {k: v.clone() for k, v in trainee.tensors().items()}


def same(one, other):
    return set(one) == set(other) and all(torch.equal(one[k], other[k]) for k in one)


def normed():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 1))


class TestOptimizerStep:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_gradient_that_is_not_finite_touches_nothing(self, bad):
        """Weights and Adam's moments stay, the gradient is cleared, the message names the step."""
        trainee = trainee_of()
        trainee.model(torch.ones(1, 3).double()).sum().backward()
        optimizer_step(trainee, 0.1, step=1)
        before = weights(trainee)
        moments = {k: {n: v.clone() for n, v in s.items()} for k, s in trainee.optimizer.state_dict()["state"].items()}
        trainee.model(torch.ones(1, 3).double()).sum().backward()
        trainee.model.weight.grad[0, 1] = bad
        with pytest.raises(TrainingStopped, match=r"model.*step 2.*a lower .* and --override-config, .* --restart$"):
            optimizer_step(trainee, 0.1, step=2)
        assert same(weights(trainee), before)
        for k, s in trainee.optimizer.state_dict()["state"].items():
            assert same(s, moments[k])
        assert all(p.grad is None for p in trainee.model.parameters())

    def test_it_is_adamw_on_the_clipped_gradient(self):
        """A step equals the formulas: clip to norm 0.5, then Adam's first step."""
        trainee = trainee_of(max_grad_norm=0.5)
        before = torch.cat([p.detach().flatten() for p in trainee.parameters.values()])
        g = torch.tensor([3.0, 0.0, -4.0, 12.0], dtype=torch.float64)  # norm 13
        trainee.model.weight.grad, trainee.model.bias.grad = g[None, :3].clone(), g[3:].clone()
        assert optimizer_step(trainee, 0.01, step=1) == pytest.approx(13.0)
        clipped = g * 0.5 / 13
        expected = before - 0.01 * clipped / (clipped.abs() + 1e-8)  # bias-corrected moments of the first step
        after = torch.cat([p.detach().flatten() for p in trainee.parameters.values()])
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-9)

    @pytest.mark.parametrize("size, reaches", [(0.3, 0.3), (1.0, 1.0), (7.0, 1.0)])
    def test_what_reaches_the_optimizer_has_at_most_the_clipped_norm(self, size, reaches):
        """A large gradient is scaled down, a small one is not; the original norm is returned."""
        trainee, seen = trainee_of(max_grad_norm=1.0), []
        trainee.optimizer.register_step_pre_hook(lambda *_: seen.append(gradient_norm(trainee.parameters.values())))
        trainee.model.weight.grad = torch.tensor([[0.6 * size, 0.0, 0.0]], dtype=torch.float64)
        trainee.model.bias.grad = torch.tensor([0.8 * size], dtype=torch.float64)
        assert optimizer_step(trainee, 0.1, 1) == pytest.approx(size)
        assert seen == [pytest.approx(reaches, rel=1e-5)]

    def test_gradients_are_cleared_and_the_rate_is_the_given_one(self):
        trainee = trainee_of()
        trainee.model(torch.ones(1, 3).double()).sum().backward()
        optimizer_step(trainee, 0.123, 1)
        assert all(p.grad is None for p in trainee.model.parameters())
        assert trainee.optimizer.param_groups[0]["lr"] == 0.123

    def test_only_what_requires_a_gradient_trains(self):
        model = torch.nn.Linear(3, 1)
        model.bias.requires_grad_(False)
        assert set(make_trainee("m", model, learning_rate=0.1, max_grad_norm=1.0).parameters) == {"weight"}

    def test_norms_and_biases_do_not_decay(self):
        """With gradient 0, a step leaves them and scales other weights by 1 − lr · weight_decay."""
        model = normed()
        trainee = make_trainee("m", model, learning_rate=0.1, max_grad_norm=1.0, weight_decay=0.5)
        before = weights(trainee)
        for p in trainee.parameters.values():
            p.grad = torch.zeros_like(p)
        optimizer_step(trainee, 0.1, 1)
        for name, p in trainee.parameters.items():
            torch.testing.assert_close(p.detach(), before[name] * (0.95 if name in ("0.weight", "2.weight") else 1.0))

    def test_without_weight_decay_there_is_one_group(self):
        trainee = make_trainee("m", normed(), learning_rate=0.1, max_grad_norm=1.0)
        (group,) = trainee.optimizer.param_groups
        assert all(p is q for p, q in zip(group["params"], trainee.parameters.values(), strict=True))

    def test_the_norm_is_over_all_parameters_together(self):
        a, b, c = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
        a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
        assert gradient_norm([a, b, c]) == pytest.approx(5.0) and gradient_norm([c]) == 0.0


class TestLearningRate:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_warm_up_rises_in_equal_steps_to_the_peak(self, shape):
        rates = [learning_rate_at(s, 100, 2.0, shape, 4) for s in range(1, 6)]
        assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0]) and rates[4] == pytest.approx(2.0)

    def test_warm_up_can_start_above_zero(self):
        """PPO: from a tenth of the peak, over 10 updates."""
        rates = [learning_rate_at(s, 50, 1.0, "constant", 10, warmup_from=0.1) for s in (1, 5, 10, 11, 50)]
        assert rates == pytest.approx([0.1, 0.46, 0.91, 1.0, 1.0])

    @pytest.mark.parametrize("shape", SHAPES)
    def test_without_warm_up_the_first_step_has_the_peak(self, shape):
        assert learning_rate_at(1, 10, 3.0, shape, 0) == pytest.approx(3.0)

    def test_the_last_steps(self):
        """Step n of ten has done n − 1 tenths, so no step is wasted at a rate of 0."""
        last = {s: learning_rate_at(10, 10, 1.0, s, 0) for s in SHAPES}
        cosine = 0.5 * (1 + math.cos(0.9 * math.pi))
        assert last == pytest.approx(
            {"constant": 1.0, "linear": 0.1, "cosine": cosine, "cosine_with_min_lr": 0.1 + 0.9 * cosine}
        )

    def test_half_way(self):
        half = [learning_rate_at(6, 10, 1.0, s, 0) for s in SHAPES]
        assert half == pytest.approx([1.0, 0.5, 0.5, 0.55])

    def test_a_long_run_ends_at_zero_or_at_a_tenth(self):
        ends = {s: learning_rate_at(10**6, 10**6, 1.0, s, 0) for s in SHAPES}
        assert ends == pytest.approx({"constant": 1, "linear": 0, "cosine": 0, "cosine_with_min_lr": 0.1}, abs=1e-5)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_rates_never_rise_after_the_warm_up_and_stay_positive(self, shape):
        rates = [learning_rate_at(s, 20, 1.0, shape, 5) for s in range(5, 21)]
        assert all(a >= b > 0 for a, b in itertools.pairwise(rates))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_a_warm_up_as_long_as_the_run_or_longer_only_rises(self, shape):
        assert learning_rate_at(5, 5, 1.0, shape, 5) == 1.0
        assert learning_rate_at(5, 5, 1.0, shape, 10) == 0.5

    def test_one_step_in_all(self):
        assert learning_rate_at(1, 1, 1.0, "cosine", 0) == 1.0 and learning_rate_at(1, 1, 1.0, "linear", 1) == 1.0

    def test_an_unknown_schedule_is_refused(self):
        with pytest.raises(ValueError, match="lr_scheduler_type"):
            learning_rate_at(3, 10, 1.0, "polynomial", 0)


class TestBest:
    @pytest.mark.parametrize("higher, best", [(True, 3), (False, 2)])
    def test_keeps_the_weights_of_the_best_figure(self, higher, best):
        """They are copies, since training continues in place."""
        trainee, kept, seen = trainee_of(), Best("best", None, higher), {}
        for step, value in enumerate([0.5, 0.4, 0.2, 0.9, 0.9]):
            with torch.no_grad():
                trainee.model.weight.fill_(step)
            kept.offer(value, step, trainee)
            seen[step] = weights(trainee)
        assert kept.step == best and same(kept.tensors, seen[best])

    def test_keep_last_holds_no_weights(self):
        kept = Best("last", None, True)
        kept.offer(1.0, 3, trainee_of())
        assert kept.tensors == {} and (kept.value, kept.step) == (1.0, 3)

    def test_patience_counts_evaluations_without_a_better_one(self):
        """An equal figure is no improvement; an improvement resets the count."""
        kept, trainee = Best("last", 2, False), trainee_of()
        exhausted = []
        for value in (1.0, 1.0, 0.5, 0.6, 0.5):
            kept.offer(value, 0, trainee)
            exhausted.append(kept.exhausted)
        assert exhausted == [False, False, False, False, True]
        assert not Best("last", None, False, since=99).exhausted

    def test_nan_is_never_better(self):
        kept, trainee = Best("best", None, True), trainee_of()
        for value in (1.0, math.nan):
            kept.offer(value, 0, trainee)
        assert kept.value == 1.0 and kept.since == 1

    def test_restored_equals_saved(self):
        kept = Best("best", 3, True)
        for step, value in enumerate([1.0, 0.0]):
            kept.offer(value, step, trainee_of(step))
        again = Best("best", 3, True)
        again.restore(SimpleNamespace(state={"best": kept.state()}), lambda: kept.tensors)
        assert again.state() == kept.state() and same(again.tensors, kept.tensors)


class TestTrainee:
    def test_loads_strictly(self):
        """Other names or other shapes are refused before any weight is touched."""
        trainee = trainee_of()
        before, good = weights(trainee), weights(trainee_of(1))
        for bad in ({"weight": good["weight"]}, good | {"more": good["bias"]}, good | {"bias": torch.zeros(2)}):
            with pytest.raises(UserError, match="--restart"):
                trainee.load(bad)
        assert same(weights(trainee), before)
        trainee.load(good)
        assert same(weights(trainee), good)


class TestBalanced:
    tokens = (50, 10, 10, 40, 30, 20, 60, 20)

    def parts(self, size, budget=None):
        parts = balanced(list(range(8)), self.tokens, size, budget)
        assert sorted(i for part in parts for i in part) == list(range(8)), "every row once"
        return [[self.tokens[i] for i in part] for part in parts]

    def test_as_few_parts_as_the_size_allows_about_equal_in_tokens(self):
        for size, count in ((8, 1), (4, 2), (3, 3), (2, 4), (1, 8)):
            parts = self.parts(size)
            assert len(parts) == count and max(map(len, parts)) <= size
        assert sorted(map(sum, self.parts(4))) == [120, 120] and sorted(map(sum, self.parts(2))) == [50, 60, 60, 70]

    def test_within_a_budget_of_tokens(self):
        for budget in (60, 80, 120, 240):
            assert max(map(sum, self.parts(1, budget))) <= budget
        assert len(self.parts(1, 240)) == 1 and len(self.parts(1, 120)) == 2

    def test_a_row_over_the_budget_is_a_micro_batch(self):
        parts = self.parts(1, 45)
        assert [60] in parts and [50] in parts and all(sum(p) <= 45 or len(p) == 1 for p in parts)
        assert self.parts(8, 1) == [[n] for n in sorted(self.tokens, reverse=True)]


class TestSortedChunks:
    tokens = (50, 10, 10, 40, 30, 20, 60, 20)

    def parts(self, size, budget=None, widest=False):
        cost = lambda part: len(part) * max(part) if widest else sum(part)  # noqa: E731
        parts = sorted_chunks(list(range(8)), self.tokens, cost, size, budget)
        assert sorted(i for part in parts for i in part) == list(range(8)), "every row once"
        return [[self.tokens[i] for i in part] for part in parts]

    def test_shortest_first_as_many_as_fit(self):
        assert self.parts(3) == [[10, 10, 20], [20, 30, 40], [50, 60]]
        assert self.parts(1, 60) == [[10, 10, 20, 20], [30], [40], [50], [60]]
        assert self.parts(1, 60, widest=True) == [[10, 10, 20], [20, 30], [40], [50], [60]]
        assert self.parts(1, 5) == [[n] for n in sorted(self.tokens)], "a row over the budget is alone"


def test_micro_batches_hold_every_row_once_in_order():
    assert list(micro_batches([1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4], [5]]
    assert list(micro_batches([], 2)) == []


# ── fit ───────────────────────────────────────────────────────────────────────────


class Killed(Exception):
    """Stands for a machine that dies without saving."""


class Journal:
    """A tracker in memory that requests a stop, or dies, when a given step is logged."""

    def __init__(self, stop, stop_at=None, kill_at=None):
        self.rows, self.figures, self.shown, self.stop, self.stop_at, self.kill_at = (
            [],
            [],
            [],
            stop,
            stop_at,
            kill_at,
        )

    def log(self, step, metrics, seconds, tokens):
        assert seconds >= 0 and tokens > 0
        self.rows.append((step, metrics))
        if step == self.stop_at:
            self.stop.requested = True
        if step == self.kill_at:
            raise Killed

    def evaluation(self, step, metrics):
        self.figures.append((step, metrics))

    def samples(self, step, rows):
        self.shown.append((step, rows))

    @contextlib.contextmanager
    def progress(self, total, description, start=0):
        yield SimpleNamespace(update=lambda step, **figures: None)

    def rewind(self, step):
        """Drop rows after a step, as pipeline/running.py does before a stage resumes."""
        for name in ("rows", "figures", "shown"):
            setattr(self, name, [row for row in getattr(self, name) if row[0] <= step])


class Regression:
    """A run of `fit` on 10 rows of y = w·x, small enough to be repeated 100 times."""

    def __init__(self, folder, every=2, keep="last", patience=None, micro_size=3, learning_rate=0.05, figures=None):
        self.keep, self.patience, self.cut = keep, patience, lambda batch: micro_batches(batch, micro_size)
        self.checkpoints = CheckpointStore(folder, every, 2, "run", say=lambda line: None)
        self.rate, self.figures, self.journal = learning_rate, figures, Journal(None)
        x = torch.randn(10, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.x, self.y = (x, x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64) + 0.1 * x[:, :1] ** 2)

    def run(self, stop_at=None, kill_at=None):
        """Run or resume, and return figures, weights and the journal of all attempts."""
        stop = StopFlag()
        found = self.checkpoints.newest()
        self.journal.rewind(found.step if found else -1)
        earlier, self.journal = self.journal, Journal(stop, stop_at, kill_at)
        self.journal.rows, self.journal.figures, self.journal.shown = (earlier.rows, earlier.figures, earlier.shown)
        session = Session("rm", 7, self.checkpoints, self.journal, stop, collective=False)
        self.trainee = trainee_of()

        def loss(rows, batch):
            value = ((self.trainee.model(self.x[rows]) - self.y[rows]) ** 2).sum() / len(batch)
            return value, {"loss": value.item()}

        def evaluate(poll):
            if self.figures is not None:  # a scripted history: one figure an evaluation, by the number seen so far
                return {"loss": self.figures[len(self.journal.figures)]}
            with torch.no_grad():
                return {"loss": ((self.trainee.model(self.x) - self.y) ** 2).mean().item()}

        task = Task(
            order=Stream(10, 7).take(36),
            costs=[1] * 10,
            batch_size=4,
            cut=self.cut,
            loss=loss,
            evaluate=evaluate,
            samples=lambda: [{"n": 1}],
        )
        accelerator = SimpleNamespace(backward=lambda value: value.backward(), mixed_precision="no")
        schedule = Schedule(self.rate, "linear", warmup_steps=2, total=9)
        selection = Selection(self.keep, self.patience, "loss", higher_is_better=False, eval_steps=2)
        out = fit(session, accelerator, self.trainee, task, schedule, selection)
        return out, weights(self.trainee), self.journal


def assert_same_run(one, other):
    """Compare figures, weights and every journal row bit for bit."""
    assert one[0] == other[0]
    assert same(one[1], other[1])
    for name in ("rows", "figures", "shown"):
        assert getattr(one[2], name) == getattr(other[2], name)


class TestFit:
    def test_learns_and_logs_every_step(self, tmp_path):
        out, _, journal = Regression(tmp_path).run()
        assert [s for s, _ in journal.rows] == list(range(1, 10))
        assert [s for s, _ in journal.figures] == [0, 2, 4, 6, 8, 9] == [s for s, _ in journal.shown]
        assert out["loss"] < journal.figures[0][1]["loss"] and out["steps"] == 9
        assert set(journal.rows[0][1]) == {"loss", "grad_norm", "lr"}
        assert [m["lr"] for _, m in journal.rows] == [learning_rate_at(s, 9, 0.05, "linear", 2) for s in range(1, 10)]

    def test_each_batch_is_the_next_rows_of_the_order(self, tmp_path):
        """Nine steps of 4 rows draw each of 10 rows three or four times."""
        job, seen = Regression(tmp_path, micro_size=4), []
        job.x = torch.arange(10, dtype=torch.float64)[:, None].repeat(1, 3)
        hook = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, args: seen.append(args[0][:, 0].tolist()) if len(args[0]) == 4 else None
        )
        try:
            job.run()
        finally:
            hook.remove()
        assert len(seen) == 9
        drawn = [row for batch in seen for row in batch]
        for epoch in range(3):
            assert sorted(drawn[10 * epoch : 10 * epoch + 10]) == list(range(10))

    @pytest.mark.parametrize("micro_size", [1, 3, 4])
    def test_micro_batch_size_changes_nothing_but_float_order(self, tmp_path, micro_size):
        straight = Regression(tmp_path / "whole", micro_size=100).run()
        parts = Regression(tmp_path / "parts", micro_size=micro_size).run()
        for name, value in straight[1].items():
            torch.testing.assert_close(parts[1][name], value, rtol=1e-9, atol=1e-10)
        for (_, one), (_, other) in zip(straight[2].rows, parts[2].rows, strict=True):
            assert one == pytest.approx(other, rel=1e-9)

    @pytest.mark.parametrize("keep", ["last", "best"])
    @pytest.mark.parametrize("stop_at", [1, 4, 8])
    def test_stopped_by_a_signal_and_run_again_equals_straight(self, tmp_path, keep, stop_at):
        job = Regression(tmp_path / "resumed", keep=keep)
        with pytest.raises(Interrupted) as left:
            job.run(stop_at=stop_at)
        assert (left.value.step, left.value.total) == (stop_at, 9)
        assert_same_run(job.run(), Regression(tmp_path / "straight", keep=keep).run())

    @pytest.mark.parametrize("kill_at", [1, 2, 5, 9])
    def test_killed_and_run_again_equals_straight(self, tmp_path, kill_at):
        """It resumes from the newest checkpoint (every second step), or starts again."""
        job = Regression(tmp_path / "resumed", keep="best", learning_rate=0.3)
        with pytest.raises(Killed):
            job.run(kill_at=kill_at)
        assert_same_run(job.run(), Regression(tmp_path / "straight", keep="best", learning_rate=0.3).run())

    def test_stopped_at_every_step_in_turn_equals_straight(self, tmp_path):
        job = Regression(tmp_path / "resumed", every=0)
        for step in range(1, 9):
            with pytest.raises(Interrupted):
                job.run(stop_at=step)
        assert_same_run(job.run(), Regression(tmp_path / "straight", every=0).run())

    def test_a_run_of_a_version_with_another_order_of_rows_is_refused(self, tmp_path, monkeypatch):
        """Before version 2 the rows of a resumed run would have come in another order, silently."""
        with monkeypatch.context() as older:
            older.setattr(loop, "ORDER_VERSION", 1)
            with pytest.raises(Interrupted):
                Regression(tmp_path).run(stop_at=4)
        with pytest.raises(UserError, match=r"draws its rows in another order; --restart starts again"):
            Regression(tmp_path).run()

    def test_keep_best_publishes_the_best_weights(self, tmp_path):
        """With held-out losses 5, 4, 1, 3, 2, 2 at steps 0, 2, 4, 6, 8, 9, it is step 4."""
        figures = [5.0, 4.0, 1.0, 3.0, 2.0, 2.0, 1.0]
        best = Regression(tmp_path / "best", keep="best", figures=figures).run()
        assert best[0]["best_step"] == 4 and best[0]["loss"] == 1.0
        stopped = Regression(tmp_path / "at four", figures=figures)
        with pytest.raises(Interrupted):
            stopped.run(stop_at=4)
        assert same(best[1], weights(stopped.trainee))

    def test_keep_best_where_the_start_was_best(self, tmp_path):
        """If training only did harm, the initial weights are published."""
        best = Regression(tmp_path, keep="best", figures=[1.0, *range(2, 9)]).run()
        assert best[0]["best_step"] == 0 and same(best[1], weights(trainee_of()))

    def test_keep_best_where_the_start_was_best_and_the_run_was_interrupted(self, tmp_path):
        """The initial weights are restored from the checkpoint."""
        job = Regression(tmp_path, keep="best", figures=[1.0, *range(2, 9)])
        with pytest.raises(Interrupted):
            job.run(stop_at=5)
        best = job.run()
        assert best[0]["best_step"] == 0 and same(best[1], weights(trainee_of()))

    figures_without_progress = (5.0, 1.0, 2.0, 3.0, 3.0, 3.0, 1.0)

    def test_patience_ends_training_early(self, tmp_path):
        """After two evaluations without improvement on step 2, the run ends at step 6."""
        out, _, journal = Regression(tmp_path, patience=2, figures=self.figures_without_progress).run()
        assert (out["steps"], out["best_step"], out["loss"]) == (6, 2, 3.0)
        assert [s for s, _ in journal.figures] == [0, 2, 4, 6]

    @pytest.mark.parametrize("keep", ["last", "best"])
    def test_killed_after_its_last_checkpoint_where_patience_had_run_out_equals_straight(self, tmp_path, keep):
        """A kill after the checkpoint of step 6, the last one, changes no figure."""
        job = Regression(tmp_path, patience=2, keep=keep, figures=self.figures_without_progress)
        straight = job.run()
        expected = (dict(straight[0]), straight[1])
        again = job.run()  # the same folder: what a new process finds
        assert again[0] == expected[0] and same(again[1], expected[1])

    def test_a_signal_at_the_step_where_patience_runs_out_changes_no_figure(self, tmp_path):
        """The run ends, or stops and then gives the same figures."""
        straight = Regression(tmp_path / "straight", patience=2, figures=self.figures_without_progress).run()
        job = Regression(tmp_path / "resumed", patience=2, every=0, figures=self.figures_without_progress)
        try:
            again = job.run(stop_at=6)
        except Interrupted:
            again = job.run()
        assert again[0] == straight[0] and same(again[1], straight[1])

    def test_a_loss_that_is_not_finite_stops_before_any_weight_moves(self, tmp_path):
        job = Regression(tmp_path)
        job.y[0] = math.nan
        with pytest.raises(TrainingStopped, match=r"step 1|step 2|step 3"):
            job.run()
        assert all(torch.isfinite(p).all() for p in job.trainee.model.parameters())

    @pytest.mark.parametrize("before, today", [(0.0, 0.0), (0.0, 0.3), (0.3, 0.0), (0.2, 0.3)])
    @pytest.mark.parametrize("grouped_before", [True, False])
    def test_weight_decay_and_beta_are_todays_after_a_resume(self, tmp_path, before, today, grouped_before):
        """Each weight keeps its moments, whatever group it is in now.

        Old checkpoints have a single group whatever the weight decay.
        """
        options = {"learning_rate": 0.1, "max_grad_norm": 1.0}
        session = SimpleNamespace(
            stage="rm", checkpoints=CheckpointStore(tmp_path, 1, 2, "run", say=lambda line: None), collective=False
        )
        old = make_trainee("model", normed(), **options, weight_decay=before)
        if not grouped_before:
            adamw = {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": before, "fused": True}
            old.optimizer = torch.optim.AdamW(old.parameters.values(), **adamw)
        for step in range(1, 4):
            old.model(torch.randn(5, 3)).square().mean().backward()
            optimizer_step(old, 0.1, step)
        save_checkpoint(session, 3, 9, TrainingState([old], Best("last", None, False)), {})
        new = make_trainee("model", normed(), **options, weight_decay=today, adam_beta2=0.9)
        assert load_checkpoint(session, TrainingState([new], Best("last", None, False)), 9)[0] == 3
        assert same(weights(new), weights(old))
        for name, p in new.parameters.items():
            assert same(new.optimizer.state[p], old.optimizer.state[old.parameters[name]]), name
        groups = new.optimizer.param_groups
        assert [group["weight_decay"] for group in groups] == ([today, 0.0] if today else [0.0])
        assert {group["betas"] for group in groups} == {(0.9, 0.9)}
        assert sum(len(group["params"]) for group in groups) == len(new.parameters)

    def test_a_checkpoint_of_another_model_is_refused(self, tmp_path):
        job = Regression(tmp_path)
        with pytest.raises(Interrupted):
            job.run(stop_at=1)
        tensors = {"model": {"other": torch.zeros(3)}, "model_optimizer": {}}
        found = job.checkpoints.newest()
        job.checkpoints.save(2, tensors, found.state, 9)
        with pytest.raises(UserError, match="--restart"):
            job.run()
