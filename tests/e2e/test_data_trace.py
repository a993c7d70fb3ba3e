"""`llm-dist data trace`: from a line of metrics to the documents behind it."""

import json
from pathlib import Path

from tests.e2e.commands import llm_dist


def test_the_documents_of_a_step_are_in_the_corpus(finished: Path, corpus: Path) -> None:
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    found = llm_dist("data", "trace", finished, "--step", 8, "--max-characters", 30, "--json").json
    assert (found["step"], found["notes"], found["epochs"].keys()) == (8, [], {"train"})
    assert {document["row"] for document in found["documents"]} == set(range(8))
    for document in found["documents"]:
        assert (document["source"], document["file"]) == ("train", corpus.name)
        assert document["text"].strip("\ufffd") in texts[document["number"] - 1]
    lines = llm_dist("data", "trace", finished, "--step", 8).out.splitlines()
    assert len(lines) == len(found["documents"])
    assert lines[0].startswith(
        f"row 0 tokens 0-{found['documents'][0]['row_tokens'][1] - 1}: train: {corpus.name} document "
    )


def test_steps_of_other_data_are_not_traced(finished: Path, other_shards: Path) -> None:
    found = llm_dist("data", "trace", finished, "--step", 1, f"data.train={other_shards}/train").mistake
    assert found.startswith(f"source train ({other_shards}/train) has the fingerprint ")
    assert "restore the folder to trace its steps" in found
    assert llm_dist("data", "trace", finished, "--step", 0).code == 2
