"""Files seen whole or not at all."""

from concurrent.futures import ThreadPoolExecutor

from llm_dist.publishing import publish


def test_a_reader_never_finds_half_a_file(tmp_path):
    path = tmp_path / "new" / "file.json"
    texts = [letter * 1_000_000 for letter in "ab"]
    publish(path, texts[0])
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(lambda: [publish(path, texts[turn % 2]) for turn in range(30)])
        while not writing.done():
            assert path.read_text() in texts
        writing.result()
    assert list(path.parent.iterdir()) == [path]
