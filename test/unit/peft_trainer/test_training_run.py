"""A run's life: interruptions that must leave no trace, state in and out, failures, refusals."""

from __future__ import annotations

import copy
import json
import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from sglang_harli.core import QuantumKind
from sglang_harli.errors import ConfigError, StateError, TrainingError, UnsupportedError
from sglang_harli.peft_trainer.base.frozen_base import from_transformers
from sglang_harli.peft_trainer.base.training_mode import training_mode
from sglang_harli.peft_trainer.layers.dropout import DropoutMasks
from sglang_harli.peft_trainer.records import SHAPES_KEPT, ShapesSeen
from sglang_harli.peft_trainer.run import TrainingRun
from sglang_harli.protocol.internal import BatchCursor, MicroBatch
from sglang_harli.service.publish.peft_config import adapter_config
from support.trainer.trainer_oracle import (
    VOCABULARY,
    at_most,
    at_random,
    drive,
    everything,
    feed,
    hyperparameters,
    make_run,
    one_thread,
    random_steps,
    tiny_model,
    weights,
)

__all__ = ["one_thread"]  # a fixture

HP = hyperparameters(gradient_accumulation_steps=2, lora_dropout=0.1, weight_decay=0.1)
STEPS = random_steps(6, 4, 2)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def saved(run: TrainingRun) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state as it travels: plain tensors and a document."""
    state = {name: tensor.clone() for name, tensor in run.state_tensors()}
    return state, json.loads(json.dumps(run.state_meta()))


def assert_identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def uninterrupted(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    run = make_run(tiny_model("llama", dtype), HP, STEPS, rows=2)
    feed(run, STEPS)
    drive(run, everything)
    state = saved(run)[0]
    run.release()
    return state


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_micro_batches_leave_no_trace_in_the_weights(dtype: torch.dtype) -> None:
    run = make_run(tiny_model("llama", dtype), HP, STEPS, rows=2)
    feed(run, STEPS)
    # Dropped at ever later quanta, so that every place in a micro-batch and a step is hit.
    limit, count = 1, 0
    while (shape := run.peek()) is not None:
        run.run(shape.rows)
        count += 1
        if count == limit and limit < 50:
            run.drop_micro_batch()
            limit, count = limit + 1, 0
    assert limit > 20  # quanta of a micro-batch
    assert run.finished
    assert_identical(saved(run)[0], uninterrupted(dtype))
    assert run.tokens == sum(len(ids) for step in STEPS for ids, _ in step.rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_restored_run_ends_at_the_same_bits(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype)
    run = make_run(model, HP, STEPS, rows=2)
    feed(run, STEPS)
    drive(run, everything, until=3)
    assert run.at_step_boundary
    state, meta = saved(run)
    drive(run, everything, until=4)  # further on than what was saved
    run.release()

    again = make_run(model, HP, STEPS, rows=2)
    again.load_state(state.__getitem__, meta)
    assert (again.next_cursor.step, again.next_cursor.index, again.applied_step) == (4, 0, 3)
    assert not again.ready
    feed(again, STEPS, start=4)
    drive(again, everything)
    assert again.finished and again.tokens == sum(len(ids) for step in STEPS for ids, _ in step.rows)
    assert_identical(saved(again)[0], uninterrupted(dtype))
    again.release()


def test_state_has_pefts_names_and_loads_in_plain_peft(tmp_path: Any) -> None:
    hp = hyperparameters(use_rslora=True, lora_r=3, lora_alpha=2.0, learning_rate=1e-2)
    steps = random_steps(4, 2, 1)
    model = tiny_model("qwen3", torch.float32)
    run = make_run(model, hp, steps)
    feed(run, steps)
    drive(run, everything)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    pieces = run._pieces
    with training_mode():
        x = pieces.embed(ids)
        for program in pieces.layers:
            x = program.forward(x, pieces.rotary.upto(ids.shape[1]))
        live = pieces.norm.forward(x, None) @ pieces.head_weight.t()
        bare = model(input_ids=ids).logits  # beside a run the base is as it was
    adapter = weights(run)
    assert "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight" in adapter
    parts = {"adapter", "exp_avg", "exp_avg_sq"}
    assert {name.split("/")[0] for name, _ in run.state_tensors()} == parts
    state_bytes = sum(tensor.nbytes for _, tensor in run.state_tensors())
    assert state_bytes == sum(3 * tensor.nbytes for tensor in adapter.values())
    run.release()
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter_config(hp, "base")))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, bare, rtol=0, atol=0)
        loaded: Any = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path))
        plain = loaded(input_ids=ids).logits
    torch.testing.assert_close(plain, live, rtol=1e-5, atol=1e-5)
    assert (plain - bare).abs().max() > 1e-3


def test_global_random_state_and_inference_mode_are_left_alone() -> None:
    model = tiny_model("llama", torch.float32)
    before = torch.get_rng_state()
    with torch.inference_mode():
        run = make_run(model, HP, STEPS)
        feed(run, STEPS)
        drive(run, at_random(1))
        assert run.finished and torch.is_inference_mode_enabled()
        assert not any(tensor.is_inference() for _, tensor in run.state_tensors())
    assert torch.equal(torch.get_rng_state(), before)


def test_backward_runs_on_the_calling_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where autograd differentiates a piece of a layer: the norms in fp64."""
    from sglang_harli.peft_trainer.layers.rms_norm import RmsNorm

    threads: set[int] = set()
    native = RmsNorm._native

    def spied(self: RmsNorm, x: torch.Tensor) -> torch.Tensor:
        out = native(self, x)
        if out.requires_grad:
            out.register_hook(lambda _grad: threads.add(threading.get_ident()))
        return out

    monkeypatch.setattr(RmsNorm, "_native", spied)
    run = make_run(tiny_model(), HP, STEPS)
    feed(run, STEPS)
    drive(run, everything, until=1)
    assert threads == {threading.get_ident()}


def test_release_gives_the_base_back_and_another_run_may_follow() -> None:
    model = tiny_model("llama", torch.float32)
    names = [name for name, _ in model.named_modules()]
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
    for _ in range(2):
        run = make_run(model, HP, STEPS)
        feed(run, STEPS)
        drive(run, everything, until=2)
        run.release()
        run.release()
        assert [name for name, _ in model.named_modules()] == names
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, before)
    assert not any(p.requires_grad for p in model.parameters())


class TestQuanta:
    def test_kinds_come_in_order_and_rows_are_chosen_at_each(self) -> None:
        steps = random_steps(1, 3, 1)
        run = make_run(tiny_model(dtype=torch.float32), hyperparameters(), steps, keep=False)
        assert not run.ready
        feed(run, steps)
        assert run.batches_ahead == 1 and run.next_cursor.step == 2
        kinds: list[str] = []
        rows: dict[str, list[int]] = {}
        while (shape := run.peek()) is not None:
            take = shape.rows if shape.fixed else min(2, shape.rows)
            done = run.run(take)
            assert done.kind == shape.kind and done.rows == take
            if not kinds or kinds[-1] != done.kind:
                kinds.append(done.kind)
            rows.setdefault(done.kind, []).append(take)
        assert kinds == ["copy", "embed", "forward", "head", "backward", "optimizer"]
        assert rows["forward"] == [2, 1, 2, 1] == rows["backward"]
        assert run.batches_ahead == 0 and run.finished and run.at_step_boundary

    def test_fixed_rows_fix_every_quantum(self) -> None:
        steps = random_steps(2, 5, 1)
        run = make_run(tiny_model(dtype=torch.float32), hyperparameters(), steps, rows=2)
        feed(run, steps)
        taken = []
        while (shape := run.peek()) is not None:
            assert shape.fixed
            with pytest.raises(StateError, match=r"offers"):
                run.run(shape.rows + 1)
            run.run(shape.rows)
            if shape.kind == QuantumKind.BACKWARD:
                taken.append(shape.rows)
        assert taken == [2, 2, 1] * 4

    def test_tokens_count_padding_of_the_range_only_and_first_shapes_are_told(self) -> None:
        rows = [([1] * n, [1] * n) for n in (3, 9, 5)]
        from support.trainer.trainer_oracle import Step

        steps = [Step(rows, [[0, 1, 2]])] * 2
        run = make_run(tiny_model(dtype=torch.float32), hyperparameters(), steps)
        feed(run, steps)
        seen = []
        while (shape := run.peek()) is not None:
            count = shape.rows if shape.fixed else min(2, shape.rows)
            new, again = run.new_shapes(shape, [count, count])
            done = run.run(count)
            assert new == again == done.first_of_shape and not done.misleads
            if done.kind == QuantumKind.FORWARD:
                assert shape.row_tokens == 9
                seen.append((done.tokens, done.first_of_shape))
        assert seen[:2] == [(18, True), (3, True)]
        assert set(seen[2:]) == {(18, False), (3, False)}

    def test_shapes_that_have_not_run_for_long_are_forgotten(self) -> None:
        seen = ShapesSeen()
        assert seen.add(QuantumKind.FORWARD, 8, 8) and not seen.add(QuantumKind.FORWARD, 8, 8)
        for width in range(9, 9 + SHAPES_KEPT - 1):
            assert seen.add(QuantumKind.FORWARD, width, width)
        assert seen.has(QuantumKind.FORWARD, 8, 8)
        assert seen.add(QuantumKind.BACKWARD, 8, 8) and not seen.has(QuantumKind.FORWARD, 8, 8)
        assert seen.has(QuantumKind.FORWARD, 9, 9)

    def test_waiting_for_data(self) -> None:
        run = make_run(tiny_model(dtype=torch.float32), HP, STEPS)
        drive(run, everything)
        assert run.peek() is None and run.ready and not run.finished
        with pytest.raises(StateError, match="waits for data"):
            run.run(1)
        feed(run, STEPS[:1])
        drive(run, everything)
        assert run.applied_step == 1 and run.next_cursor.step == 2

    def test_state_is_that_of_the_last_step_until_the_next_is_applied(self) -> None:
        hp = hyperparameters(lora_r=400, gradient_accumulation_steps=2)  # one layer a slice
        run = make_run(tiny_model(dtype=torch.float32), hp, STEPS)
        with pytest.raises(StateError, match="cannot be taken"):
            run.state_tensors()
        feed(run, STEPS)
        drive(run, everything, until=1)
        before, meta = saved(run)
        kinds = []
        while not kinds or kinds[-1] != QuantumKind.OPTIMIZER:
            assert run.state_consistent
            assert_identical(saved(run)[0], before)
            assert saved(run)[1] == meta
            kinds.append(run.run(run.peek().rows).kind)  # type: ignore[union-attr]
        assert QuantumKind.ACCUMULATE in kinds and not run.at_step_boundary
        with pytest.raises(StateError, match="cannot be taken"):
            run.state_tensors()
        with pytest.raises(StateError, match="first quantum"):
            run.load_state(lambda name: torch.zeros(1), {})


class TestFailures:
    def test_loss_not_finite_is_told_and_not_applied(self) -> None:
        model = tiny_model(dtype=torch.float32)
        steps = random_steps(3, 2, 1)
        run = make_run(model, hyperparameters(warmup_ratio=0.0), steps)
        feed(run, steps)
        drive(run, everything, until=1)
        before = saved(run)[0]
        model.model.norm.weight.data[0] = math.nan
        while run.applied_step < 2:
            run.run(run.peek().rows)  # type: ignore[union-attr]
        with pytest.raises(TrainingError, match=r"step 2: the loss is nan.*learning_rate") as caught:
            run.take_metrics()
        assert caught.value.code == "loss_not_finite"
        assert_identical(saved(run)[0], before)

    def test_half_precision_overflow_lowers_the_scale_and_goes_on(self) -> None:
        steps = random_steps(4, 2, 1)
        run = make_run(tiny_model(dtype=torch.float16), hyperparameters(warmup_ratio=0.0), steps)
        run._optimizer.scale.fill_(2.0**24)  # overflows at first
        feed(run, steps)
        outcome = drive(run, everything)
        assert all(map(math.isfinite, outcome.losses)) and len(outcome.losses) == 4
        assert math.isinf(outcome.norms[0]) or math.isnan(outcome.norms[0])
        meta = run.state_meta()
        assert meta["step"] == 4 and meta["adam_steps"] < 4 and meta["loss_scale"] < 2.0**24

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"lengths": [3, 2]}, r"4 ids, 2 places and 2 targets for rows of \[3, 2\]"),
            ({"lengths": [1, 2]}, r"rows of \[1, 2\]"),
            ({"lengths": [2, 0]}, r"rows of \[2, 0\]"),
            ({"step_target_tokens": 0}, "at least one target"),
            ({"micro_batches": 9}, "more micro-batches"),
            ({"ids": [1, 2, VOCABULARY, 3]}, rf"token ids must lie in 0\.\.{VOCABULARY - 1}.*tokenizer"),
            ({"targets": [2, -1]}, "label ids"),
            ({"places": [0, 4]}, r"places of targets must lie in 0\.\.3, found 0\.\.4"),
        ],
    )
    def test_bad_data_is_named(self, change: dict[str, Any], named: str) -> None:
        """Its form at once, its ids in the quantum that begins it."""
        run = make_run(tiny_model(dtype=torch.float32), HP, STEPS)
        values: dict[str, Any] = {
            "job": "j",
            "attempt": 1,
            "cursor": BatchCursor(epoch=1, step=1, index=0),
            "micro_batches": 2,
            "lengths": [2, 2],
            "rows": [0, 1],
            "step_target_tokens": 2,
        }
        arrays = [
            np.array(change.pop(name, plain), dtype=np.int32)
            for name, plain in (("ids", [1, 2, 3, 4]), ("places", [0, 2]), ("targets", [2, 4]))
        ]
        with pytest.raises(TrainingError, match=named) as caught:
            run.feed(MicroBatch(**(values | change)), *arrays)
            drive(run, everything)
        assert caught.value.code == "bad_data"

    def test_a_micro_batch_that_came_before_or_leaves_a_gap_changes_nothing(self) -> None:
        run = make_run(tiny_model(dtype=torch.float32), HP, STEPS)
        feed(run, STEPS, start=2)  # the first one is missing
        assert (run.batches_ahead, run.next_cursor.step, run.next_cursor.index) == (0, 1, 0)
        feed(run, STEPS)
        ahead, cursor = run.batches_ahead, run.next_cursor
        feed(run, STEPS)  # all of it again
        assert (run.batches_ahead, run.next_cursor) == (ahead, cursor)
        assert cursor.step == len(STEPS) + 1
        run.release()

    def test_a_state_of_another_job_is_refused(self) -> None:
        model = tiny_model(dtype=torch.float32)
        run = make_run(model, HP, STEPS)
        feed(run, STEPS)
        drive(run, everything, until=1)
        state, meta = saved(run)
        run.release()
        other = make_run(model, hyperparameters(lora_r=6), STEPS)
        other.load_state(state.__getitem__, meta)
        with pytest.raises(TrainingError, match="has shape"):
            drive(other, everything)
        other.release()

    def test_refusals_name_what_to_change(self) -> None:
        model = tiny_model(dtype=torch.float32)
        with pytest.raises(ConfigError, match=rf"at least {VOCABULARY * 4} bytes"):
            make_run(model, HP, STEPS, logits_bytes=VOCABULARY * 4 - 1)
        model.config.architectures = ["GPT2LMHeadModel"]
        with pytest.raises(UnsupportedError, match=r"GPT2LMHeadModel.*finetune off"):
            from_transformers(model)


def test_dropout_masks_depend_on_their_keys_alone() -> None:
    masks = DropoutMasks(0.5, 3, torch.device("cpu"), torch.float32)

    def draw(
        step: int, rows: list[tuple[int, int]], width: int, layer: int = 0, module: str = "q_proj"
    ) -> Any:
        masks.set_rows(step, rows, width)
        return masks.draw(layer, module, 6).view(len(rows), width, 6)

    both = draw(1, [(0, 4), (1, 3)], 4)
    assert torch.equal(draw(1, [(1, 3)], 3)[0], both[1, :3])
    assert torch.equal(both, draw(1, [(0, 4), (1, 3)], 4))
    assert not both[1, 3:].any()
    assert set(both[0].unique().tolist()) == {0.0, 2.0}
    others = [
        draw(2, [(0, 4)], 4)[0],
        draw(1, [(2, 4)], 4)[0],
        draw(1, [(0, 4)], 4, layer=1)[0],
        draw(1, [(0, 4)], 4, module="k_proj")[0],
    ]
    assert not any(torch.equal(both[0], other) for other in others)


def test_pieces_of_any_size_give_the_same_loss() -> None:
    model = tiny_model(dtype=torch.float32)
    results = []
    for choose in (everything, at_most(1), at_random(9)):
        run = make_run(model, HP, STEPS)
        feed(run, STEPS)
        results.append(drive(run, choose).losses)
        run.release()
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert results[2] == pytest.approx(results[0], rel=1e-5)
