"""Which table of rows and keys serves which type of Hugging Face model; writes and reads nothing.

What cannot be exported is decided in `llm_dist.model.hugging_face`; a model that reaches this room can be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_dist.config import LANGUAGE, Heads, Model
from llm_dist.errors import UserError
from llm_dist.exchange import bert, gpt2, llama, modernbert
from llm_dist.exchange.config_keys import HuggingFaceConfig
from llm_dist.exchange.rows import Row
from llm_dist.model.hugging_face import NAMES, ModelType, model_type
from llm_dist.tokenizer import CLS, PAD, SEP, SEPARATOR, SPECIAL_TOKENS

OUR_IDS: Mapping[str, int] = {token: id_ for id_, token in enumerate(SPECIAL_TOKENS)}


def rows(
    model: Model, heads: Heads = LANGUAGE, special_ids: Mapping[str, int] = OUR_IDS, kind: ModelType | None = None
) -> list[Row]:
    """Every tensor of the model in theirs; of the type that it exports to by default."""
    kind = kind or model_type(model, heads)
    match kind:
        case "gpt2":
            return [*gpt2.body_rows(model), *gpt2.head_rows(model, heads)]
        case "bert" | "roberta":
            return [*bert.body_rows(model, kind, special_ids[PAD]), *bert.head_rows(model, heads, kind)]
        case "modernbert":
            return [*modernbert.body_rows(model), *modernbert.head_rows(model, heads)]
        case _:
            return [*llama.body_rows(model), *llama.head_rows(model, heads)]


def token_ids(special_ids: Mapping[str, int] = OUR_IDS, end_id: int | None = None) -> dict[str, int]:
    """The separator begins a document, and ends it where no other id (`end_id`) does."""
    separator = special_ids[SEPARATOR]
    ends = separator if end_id is None else end_id
    return {"bos_token_id": separator, "eos_token_id": ends, "pad_token_id": special_ids[PAD]}


def hugging_face_config(
    model: Model,
    hugging_face_class: str,
    vocabulary_tokens: int,
    dtype: str,
    *,
    heads: Heads = LANGUAGE,
    labels: tuple[str, ...] = (),
    special_ids: Mapping[str, int] = OUR_IDS,
    end_id: int | None = None,
) -> dict[str, Any]:
    """Content of config.json; `dtype` by torch's name."""
    common = {
        "architectures": [hugging_face_class],
        "vocab_size": vocabulary_tokens,
        "tie_word_embeddings": model.tied_head,
        "dtype": dtype,
        **_text_ids(model, special_ids, end_id),
    }
    if heads.classes:
        names = labels or tuple(f"LABEL_{number}" for number in range(heads.classes))
        common |= {
            "id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in enumerate(names)},
            "problem_type": "single_label_classification",
        }
        common |= {} if model.is_causal else {"classifier_dropout": model.dropout}
    return common | _keys(model, heads, special_ids)


def _text_ids(model: Model, special_ids: Mapping[str, int], end_id: int | None) -> dict[str, Any]:
    if model.is_causal:
        return {"use_cache": True, **token_ids(special_ids, end_id)}
    cls, sep = special_ids[CLS], special_ids[SEP]
    ids = {"bos_token_id": cls, "eos_token_id": sep, "pad_token_id": special_ids[PAD]}
    return ids | ({"cls_token_id": cls, "sep_token_id": sep} if model_type(model) == "modernbert" else {})


def _keys(model: Model, heads: Heads, special_ids: Mapping[str, int]) -> dict[str, Any]:
    match model_type(model, heads):
        case "gpt2":
            return gpt2.keys(model, heads)
        case "bert" | "roberta":
            return bert.keys(model, heads, special_ids[PAD])
        case "modernbert":
            return modernbert.keys(model, heads)
        case _:
            return llama.keys(model, heads)


def kind_of(config: HuggingFaceConfig) -> ModelType:
    """Type of the model in a folder.

    Raises:
        UserError: an unknown one; the message lists the known ones.
    """
    kind = config.table.get("model_type")
    if kind in NAMES:
        return kind  # type: ignore[no-any-return]
    said = f"model_type={kind}" if kind else f"architectures={config.table.get('architectures')} and no model_type"
    raise UserError(f"{config.folder}: config.json has {said}, which is unknown here; known are {', '.join(NAMES)}")


def model_of(config: HuggingFaceConfig) -> Model:
    """Our `[model]` of a config.json.

    Raises:
        UserError: an unknown type, or a key with a value that we do not compute the same.
    """
    kind = kind_of(config)
    config.refuse_what_we_never_compute()
    table = {"gpt2": gpt2, "bert": bert, "roberta": bert, "modernbert": modernbert}.get(kind, llama)
    try:
        return Model(**table.model_keys(config))
    except ValueError as error:
        words = str(error).splitlines()
        raise UserError(f"{config.folder}: config.json means no model here: {' '.join(words[1:3])}") from None


def known_names(kind: ModelType) -> tuple[str, tuple[str, ...], Mapping[str, str]]:
    """Prefix of the body's tensors, how their names go on behind it, and tensors that stand for others of ours."""
    match kind:
        case "gpt2":
            return gpt2.PREFIX, gpt2.BASE_NAMES, gpt2.TIED
        case "bert" | "roberta":
            return f"{kind}.", bert.BASE_NAMES, bert.TIED
        case "modernbert":
            return modernbert.PREFIX, modernbert.BASE_NAMES, modernbert.TIED
        case _:
            return llama.PREFIX, llama.BASE_NAMES, llama.TIED
