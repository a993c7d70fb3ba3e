from tests.e2e.conftest import corpus, shards, tokenizer, write_run_file

__all__ = ["corpus", "shards", "tokenizer", "write_run_file"]
