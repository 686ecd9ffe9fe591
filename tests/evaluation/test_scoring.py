"""Scores are those of a plain forward call over the whole text, however the text is cut and forked."""

import math

import pytest
import torch

from nestor.errors import ConfigError, NonFiniteError
from nestor.evaluation.scoring import (
    Branch,
    Row,
    Stream,
    greedy,
    score_after,
    score_branches,
    score_rows,
    stream_scores,
)


def whole(model, ids):
    """Bits of every token but the first, from one call over the whole text."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    chosen = torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    return -chosen / math.log(2), logits.argmax(-1) == torch.tensor(ids[1:])


def everything(ids):
    wanted = torch.ones(ids.shape, dtype=torch.bool)
    wanted[:, 0] = False
    return wanted


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("piece", [5, 16, 1000])
def test_a_text_read_in_pieces_scores_as_in_one_call(models, which, piece):
    model = models[which].model
    ids = torch.randint(0, 256, (2, 40))
    scores = stream_scores(model, ids, everything(ids), piece=piece)
    for row in range(2):
        bits, correct = whole(model, ids[row].tolist())
        torch.testing.assert_close(scores.bits[row, 1:], bits, rtol=0, atol=2e-4)
        assert scores.correct[row, 1:].tolist() == correct.tolist()
    assert torch.isnan(scores.bits[:, 0]).all()


def test_only_what_is_asked_is_scored_and_nothing_is_read_beyond_it(copier):
    model = copier()
    ids = torch.randint(0, 256, (2, 40))
    wanted = torch.zeros(2, 40, dtype=torch.bool)
    wanted[0, 5] = wanted[1, 21] = True
    seen = []
    scores = stream_scores(model, ids, wanted, piece=8, progress=seen.append)
    assert torch.isfinite(scores.bits).nonzero().tolist() == [[0, 5], [1, 21]]
    assert model.calls == [(2, 8), (2, 8), (2, 5)] and sum(seen) == 2 * 21


def test_rows_of_many_lengths_in_a_batch_score_as_alone(models, foreign):
    for subject in (*models, foreign):
        rows = [Row(torch.randint(0, 256, (n,)).tolist(), 2, n - 1) for n in (30, 5, 44, 17)]
        together = score_rows(subject.model, rows, batch_size=3, prefix=[256], piece=16)
        for row, (bits, correct) in zip(rows, together, strict=True):
            alone, right = whole(subject.model, [256, *row.ids])
            torch.testing.assert_close(bits, alone[2 : len(row.ids) - 1], rtol=0, atol=2e-4)
            assert correct.tolist() == right[2 : len(row.ids) - 1].tolist()


def test_rows_behind_what_is_read_once_score_as_with_it_in_front(models, foreign, guesser):
    read = torch.randint(0, 256, (20,)).tolist()
    rows = [
        Row(torch.randint(0, 256, (n,)).tolist(), start, n) for n, start in ((9, 2), (4, 0), (1, 0), (7, 6))
    ]
    for model in (models[0].model, models[1].model, foreign.model, guesser(2)):
        whole_rows = score_rows(model, rows, batch_size=1, prefix=read)
        for size in (1, 3, 9):
            for one, other in zip(score_after(model, read, rows, batch_size=size), whole_rows, strict=True):
                torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=2e-4)
                assert one[1].tolist() == other[1].tolist() and one[0].isfinite().all()
    with pytest.raises(ConfigError, match="1 tokens are to be read first"):
        score_after(foreign.model, read[:1], rows, batch_size=2)


def test_a_branch_scores_as_its_trunk_read_anew_and_leaves_no_trace(models, foreign):
    for subject in (*models, foreign):
        trunks = [torch.randint(0, 256, (60,)).tolist() for _ in range(3)]
        branches = [
            [Branch(after, torch.randint(0, 256, (9 + i,)).tolist(), 4) for after in (10, 10, 33, 60)]
            for i in range(3)
        ]
        found = score_branches(subject.model, trunks, branches, batch_size=2, prefix=[256], piece=16)
        for trunk, mine, scores in zip(trunks, branches, found, strict=True):
            for branch, (bits, correct) in zip(mine, scores, strict=True):
                text = [256, *trunk[: branch.after], *branch.ids]
                alone, right = whole(subject.model, text)
                count = len(branch.ids) - branch.start
                torch.testing.assert_close(bits, alone[-count:], rtol=0, atol=2e-4)
                assert correct.tolist() == right[-count:].tolist()


def test_greedy_takes_the_likeliest_token_each_time(models):
    for subject in models:
        ids = torch.randint(0, 256, (30,)).tolist()
        answer = greedy(Stream(subject.model, 8), ids, 6)
        for token in answer:
            ids.append(token)
            assert whole(subject.model, ids)[1][-1]


def test_misaligned_branches_and_bad_sizes_are_refused(models):
    model, trunks = models[0].model, [[1] * 20, [2] * 20]
    with pytest.raises(ConfigError, match="align"):
        score_branches(model, trunks, [[Branch(4, [1, 2], 1)], [Branch(5, [1, 2], 1)]], batch_size=2)
    for places in ((0,), (8, 4)):
        with pytest.raises(ConfigError, match="in order"):
            score_branches(model, trunks[:1], [[Branch(p, [1, 2], 1) for p in places]], batch_size=2)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        score_rows(model, [Row([1, 2], 1, 2)], batch_size=0)
    with pytest.raises(ConfigError, match="first token"):
        stream_scores(model, torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ConfigError, match="piece is 0"):
        stream_scores(model, torch.ones(1, 4, dtype=torch.int64), everything(torch.ones(1, 4)), piece=0)


def test_a_model_without_a_cache_reads_one_piece_and_no_more(copier):
    class Forgetful(copier):
        def forward(self, input_ids, past_key_values=None, use_cache=True):
            output = super().forward(input_ids)
            output.past_key_values = None
            return output

    ids = torch.randint(0, 256, (1, 20))
    stream_scores(Forgetful(), ids, everything(ids), piece=19)
    with pytest.raises(ConfigError, match="returns no cache"):
        stream_scores(Forgetful(), ids, everything(ids), piece=18)


def test_a_score_that_is_not_finite_is_an_error(copier):
    class Broken(copier):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits[0, -1] = float("nan")
            return output

    ids = torch.randint(0, 256, (1, 20))
    with pytest.raises(NonFiniteError, match="not finite"):
        stream_scores(Broken(), ids, everything(ids))
