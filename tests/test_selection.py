import pytest
import torch

from kd_plugin.objective import selection as selections
from kd_plugin.objective.selection import NAMES, ScoreQueue, Selection, TokenStatistics


def entered(queue, *scores):
    queue.begin()
    queue.observe(torch.tensor(scores))
    queue.commit()


def test_the_queue_keeps_exactly_its_capacity_of_the_last_tokens():
    queue = ScoreQueue(4)
    entered(queue, 1.0, 2.0, 3.0)
    assert queue.scores.tolist() == [1, 2, 3]
    entered(queue, 4.0, 5.0)
    assert queue.scores.tolist() == [2, 3, 4, 5]
    entered(queue, *map(float, range(10, 20)))
    assert queue.scores.tolist() == [16, 17, 18, 19]


def test_the_threshold_stands_still_until_the_step_is_taken():
    queue = ScoreQueue(10)
    entered(queue, 0.0, 1.0)
    before = queue.above_quantile(torch.tensor([0.6]), 0.5).tolist()
    queue.observe(torch.tensor([100.0, 100.0]))
    assert queue.above_quantile(torch.tensor([0.6]), 0.5).tolist() == before == [True]
    queue.commit()
    assert queue.above_quantile(torch.tensor([0.6]), 0.5).tolist() == [False]


def test_an_overflowed_step_leaves_no_trace():
    queue = ScoreQueue(10)
    queue.observe(torch.tensor([1.0]))
    queue.begin()
    queue.observe(torch.tensor([2.0]))
    queue.commit()
    assert queue.scores.tolist() == [2.0]


def test_the_quantile_interpolates_and_only_higher_scores_pass():
    queue = ScoreQueue(10)
    entered(queue, 3.0, 1.0, 2.0, 4.0)  # in any order
    for q in (0.0, 0.25, 0.5, 0.9, 1.0):
        threshold = torch.quantile(torch.tensor([1.0, 2.0, 3.0, 4.0]), q)
        scores = torch.tensor([threshold, threshold + 1e-3, threshold - 1e-3])
        assert queue.above_quantile(scores, q).tolist() == [False, True, False]


def test_an_empty_queue_selects_all():
    assert ScoreQueue(3).above_quantile(torch.tensor([1.0]), 0.5) is None


def test_the_queue_is_resumed_bit_for_bit():
    queue, resumed = ScoreQueue(5), ScoreQueue(5)
    entered(queue, *torch.randn(7).tolist())
    resumed.load_state_dict(queue.state_dict())
    assert torch.equal(queue.scores, resumed.scores)
    for each in (queue, resumed):
        entered(each, 0.125)
    assert torch.equal(queue.scores, resumed.scores)


def test_a_smaller_queue_keeps_the_newest_of_a_resumed_one():
    queue, smaller = ScoreQueue(5), ScoreQueue(2)
    entered(queue, 1.0, 2.0, 3.0)
    smaller.load_state_dict(queue.state_dict())
    assert smaller.scores.tolist() == [2.0, 3.0]


def test_batch_takes_its_share_and_the_earlier_of_ties():
    nll = torch.tensor([1.0, 3.0, 2.0, 3.0, 3.0, 0.0])
    chosen = Selection("batch", 0.5)(TokenStatistics(nll))
    assert chosen.tolist() == [False, True, False, True, True, False]
    chosen = Selection("batch", 1 / 3)(TokenStatistics(nll))
    assert chosen.tolist() == [False, True, False, True, False, False]


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("batch", "all")])
def test_a_token_is_judged_by_itself(name):
    """In any order, and in parts: only ``batch`` looks at the other tokens of its micro-batch."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(3, 20, generator=generator)
    correct = torch.rand(20, generator=generator) > 0.5
    tokens = TokenStatistics(*values, correct, torch.zeros(20, dtype=torch.long))
    selection = Selection(name, 0.3, 50)
    if selection.queue is not None:
        sign = -1 if name == "teacher-entropy" else 1
        entered(selection.queue, *(sign * torch.rand(30, generator=generator)).tolist())
    whole = selection(tokens)
    order = torch.randperm(20, generator=generator)
    shuffled = selection(TokenStatistics(*(x[order] for x in tokens)))
    assert torch.equal(shuffled, whole[order])
    parts = [selection(TokenStatistics(*(x[i : i + 5] for x in tokens))) for i in range(0, 20, 5)]
    assert torch.equal(torch.cat(parts), whole)
    assert 0 < whole.sum() < 20


def test_all_is_everything():
    assert Selection("all")(TokenStatistics(torch.ones(3))) is None


def test_what_each_selection_needs():
    assert selections.WITH_RATE == ("batch", "global", "teacher-entropy")
    assert selections.WITH_QUEUE == ("global", "teacher-entropy")
    assert {name: Selection(name).needs for name in NAMES if Selection(name).needs} == {
        "teacher-entropy": ("teacher_entropy",),
        "teacher-correct": ("teacher_correct",),
        "teacher-better": ("teacher_nll",),
    }
    assert [name for name in NAMES if Selection(name).looks_at_batch] == ["batch"]
    assert all(f"{name}, " in selections.HELP for name in NAMES)


def test_an_empty_queue_takes_all_until_the_first_update_is_done():
    selection = Selection("global")
    assert selection.takes_all() and Selection("all").takes_all()
    assert not Selection("batch").takes_all()
    entered(selection.queue, 1.0)
    assert not selection.takes_all()


def test_rate_and_size_of_the_queue_describe_themselves():
    rate, size = selections.RATE, selections.QUEUE_SIZE
    assert (rate.flag, rate.default, size.flag, size.default) == (
        "--kd-selection-rate",
        0.5,
        "--kd-queue-size",
        30000,
    )
    assert rate.valid(1) and not rate.valid(0) and not rate.valid(1.1)
    assert size.valid(1) and not size.valid(0)
    assert "batch and global and teacher-entropy" in rate.help


def run_rank(rank, address, results):
    torch.distributed.init_process_group("gloo", init_method=address, world_size=2, rank=rank)
    queue = ScoreQueue(5)
    group = torch.distributed.group.WORLD
    # the ranks have different numbers of tokens; rank 1 had only a dummy batch in the second update
    queue.observe(torch.tensor([[1.0, 2.0], [10.0]][rank]))
    if rank == 0:
        queue.observe(torch.tensor([3.0]))
    queue.commit(group, torch.device("cpu"))
    first = queue.scores.tolist()
    if rank == 0:
        queue.observe(torch.tensor([4.0, 5.0]))
    queue.commit(group, torch.device("cpu"))
    results.put((rank, first, queue.scores.tolist()))
    # gloo's threads abort the process if they outlive the interpreter
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_hold_the_same_queue_in_order_of_ranks(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    address = f"file://{tmp_path / 'rendezvous'}"
    ranks = [context.Process(target=run_rank, args=(r, address, results)) for r in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == 0
    for _ in ranks:
        _, first, second = results.get()
        assert first == [1, 2, 3, 10]
        assert second == [2, 3, 10, 4, 5]
