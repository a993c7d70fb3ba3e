"""What a run carries over a restart besides tensors."""

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from llm_dist.train.account import Account


def test_the_first_evaluation_is_the_best_and_patience_counts_from_the_best():
    account = Account(step=10)
    assert account.best_loss_nats == math.inf
    assert account.saw_evaluation(3.0)
    account.step = 20
    assert not account.saw_evaluation(3.0)  # equal is no improvement
    account.step = 30
    assert not account.saw_evaluation(3.5)
    assert (account.best_step, account.evaluations_without_improvement, account.evaluated_step) == (10, 2, 30)
    account.step = 40
    assert account.saw_evaluation(2.9)
    assert (account.best_step, account.evaluations_without_improvement) == (40, 0)


def test_a_loss_that_is_no_number_is_never_the_best():
    account = Account(step=1)
    assert not account.saw_evaluation(math.nan)
    assert account.best_step is None


@given(st.lists(st.floats(0, 20), max_size=5), st.dictionaries(st.text(max_size=5), st.integers(0, 10**15), max_size=3))
def test_it_survives_json(losses, source_tokens):
    account = Account(tokens=sum(source_tokens.values()), source_tokens=source_tokens)
    for loss in losses:
        account.step += 1
        account.saw_evaluation(loss)
    text = json.dumps(account.to_dict(), allow_nan=False)
    assert Account.from_dict(json.loads(text)) == account


def test_a_checkpoint_from_before_there_were_sources_is_read():
    fields = Account(step=4, tokens=1024).to_dict()
    del fields["source_tokens"]
    assert Account.from_dict(fields) == Account(step=4, tokens=1024)
