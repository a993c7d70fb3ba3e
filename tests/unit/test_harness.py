"""What lm-evaluation-harness asks a model, against direct computation."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from llm_dist import config, tokenizer
from llm_dist.errors import UserError
from llm_dist.harness import TextModel, run_tasks
from llm_dist.model.init import initialize
from llm_dist.model.transformer import Transformer
from llm_dist.tokenizer_training import train
from llm_dist.trained import Trained

TEXT = "the quick brown fox jumps over the lazy dog, and nobody is reading " * 20


class Small(Trained):
    """A model that no checkpoint holds."""

    def model(self, precision=None):
        made = Transformer(self.run.model, self.tokenizer.vocabulary_tokens, torch.float32)
        initialize(made, self.run.model, 0.4, 1)
        return made.eval()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness") / "tokenizer"
    train([TEXT], "byte-bpe", 300, folder)
    run = config.parse(
        {
            "run": {"name": "x", "steps": 1},
            "model": {"layers": 1, "d_model": 16, "heads": 2, "max_sequence_tokens": 16},
            "data": {"train": "nowhere", "sequence_tokens": 16},
            "batch": {"tokens_per_step": 16},
        }
    )
    return Small(run, 1, Path("nowhere"), tokenizer.load(folder))


def direct(small, ids, first):
    """Log-likelihood of `ids` from `first` on, by one pass over all of them."""
    model = small.model()
    with torch.no_grad():
        logits = model.language.logits(model(torch.tensor([ids[:-1]])))[0].log_softmax(-1)
    return sum(float(logits[place - 1, ids[place]]) for place in range(first, len(ids)))


def test_a_continuation_is_scored_behind_its_context(small):
    context, text = "the quick", " brown fox"
    before, together = small.tokenizer.encode(context), small.tokenizer.encode(context + text)
    assert together[: len(before)] == before and len(together) < 16
    found, is_greedy = TextModel(small).log_likelihood(context, text)
    assert found == pytest.approx(direct(small, [small.tokenizer.separator_id, *together], len(before) + 1), rel=1e-5)
    assert not is_greedy
    alone = [small.tokenizer.separator_id, *small.tokenizer.encode(text)]
    assert TextModel(small).log_likelihood("", text)[0] == pytest.approx(direct(small, alone, 1), rel=1e-5)
    assert TextModel(small).log_likelihood(context, "") == (0.0, True)


def test_a_long_context_loses_its_beginning(small):
    context, text = "over the lazy dog," * 10, " nobody"
    ids = small.tokenizer.encode(context + text)
    num_text = len(ids) - len(small.tokenizer.encode(context))
    found = TextModel(small).log_likelihood(context, text)[0]
    assert found == pytest.approx(direct(small, ids[-17:], 17 - num_text), rel=1e-5)


def test_a_whole_text_is_scored_once_with_as_much_context_as_fits(small):
    ids = [small.tokenizer.separator_id, *small.tokenizer.encode(TEXT[:150])]
    assert len(ids) > 40
    expected = 0.0
    for first in range(1, len(ids), 16):
        end = min(first + 16, len(ids))
        begin = max(0, end - 17)
        expected += direct(small, ids[begin:end], first - begin)
    assert TextModel(small).log_likelihood_of(TEXT[:150]) == pytest.approx(expected, rel=1e-5)
    assert TextModel(small).log_likelihood_of("") == 0.0


def test_writing_stops_at_what_ends_it(small):
    whole = TextModel(small).go_on("the quick", [], 8, 0.0)
    assert whole
    stop = whole[len(whole) // 2]
    assert TextModel(small).go_on("the quick", [stop], 8, 0.0) == whole[: whole.index(stop)]
    assert TextModel(small).go_on("the lazy dog " * 30, [], 200, 0.0) is not None


def tasks_of(folder):
    (folder / "q.jsonl").write_text(
        "".join(
            json.dumps({"question": question, "choices": [" fox", " dog"], "answer": answer}) + "\n"
            for question, answer in (("the quick brown", 0), ("over the lazy", 1))
        )
    )
    (folder / "choice.yaml").write_text(
        """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: q.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
    )
    return folder


@pytest.mark.filterwarnings("ignore")
def test_the_harness_evaluates_a_local_task(small, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    found = run_tasks(small, f"{tasks_of(tmp_path)}:tiny_choice")
    assert found.tasks["tiny_choice"]["acc,none"] in (0, 0.5, 1)
    with pytest.raises(UserError, match="no task other there; it has tiny_choice"):
        run_tasks(small, f"{tmp_path}:other")


def test_what_cannot_be_run_is_one_line(small, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="must read FOLDER:NAME"):
        run_tasks(small, "nowhere:task")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'llm_dist\[harness\]'"):
        run_tasks(small, f"{tmp_path}:task")
