"""Small models of many architectures with random weights, dropout everywhere, and a tokenizer for them. Need no network."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from tiny import WORDS

_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_DECODER = {**_SMALL, "num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.1}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5 = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 48, "d_kv": 8, "decoder_start_token_id": 0}
_XLM = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64, "pad_index": 0}
_RELATIVE = {**_SMALL, "relative_attention": True, "type_vocab_size": 0, "pos_att_type": ["c2p", "p2c"]}

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "albert": {**_SMALL, "embedding_size": 16, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "bart": _BART,
    "bert": _SMALL,
    "big_bird": {**_SMALL, "attention_type": "original_full"},
    "biogpt": _SMALL,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    "camembert": _SMALL,
    "convbert": {**_SMALL, "embedding_size": 32},
    "ctrl": {**_GPT, "dff": 48},
    "data2vec-text": _SMALL,
    "deberta": {**_RELATIVE, "max_relative_positions": 32},
    "deberta-v2": {**_RELATIVE, "position_buckets": 16, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
    "electra": {**_SMALL, "embedding_size": 16},
    "ernie": _SMALL,
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "attention_dropout": 0.1},
    "flaubert": _XLM,
    "fnet": _SMALL,
    "funnel": {"block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48},
    "gemma": _DECODER,
    "gemma2": _DECODER,
    "gemma3_text": _DECODER,
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "intermediate_size": 48,
        "window_size": 8,
        "resid_dropout": 0.1,
        "attention_dropout": 0.1,
        "max_position_embeddings": 64,
    },
    "gpt_neox": {**_SMALL, "attention_dropout": 0.1, "hidden_dropout": 0.1},
    "gptj": {**_GPT, "rotary_dim": 4, "resid_pdrop": 0.1, "attn_pdrop": 0.1},
    "llama": _DECODER,
    "longformer": {**_SMALL, "attention_window": [8, 8]},
    "mbart": _BART,
    "mistral": {**_DECODER, "sliding_window": 8},
    "mixtral": {**_DECODER, "num_local_experts": 4},
    "mobilebert": {
        **_SMALL,
        "embedding_size": 16,
        "intra_bottleneck_size": 16,
        "num_feedforward_networks": 1,
        "hidden_dropout_prob": 0.1,
    },
    "modernbert": {**_SMALL, "local_attention": 8, "attention_dropout": 0.1, "mlp_dropout": 0.1},
    "mpnet": _SMALL,
    "mt5": _T5,
    "nystromformer": {**_SMALL, "segment_means_seq_len": 64, "num_landmarks": 64},
    "openai-gpt": _GPT,
    "opt": {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "attention_dropout": 0.1},
    "phi": {**_SMALL, "attention_dropout": 0.1, "resid_pdrop": 0.1},
    "phi3": {**_DECODER, "resid_pdrop": 0.1},
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "qwen3_moe": {**_DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "reformer": {"hidden_size": 32, "num_attention_heads": 2, "attention_head_size": 16, "axial_pos_embds": False},
    "rembert": {**_SMALL, "input_embedding_size": 16, "classifier_dropout_prob": 0.1},
    "roberta": _SMALL,
    "roformer": {**_SMALL, "embedding_size": 32},
    "squeezebert": {**_SMALL, "embedding_size": 32},
    "stablelm": _DECODER,
    "starcoder2": _DECODER,
    "t5": _T5,
    "xlm": _XLM,
    "xlm-roberta": _SMALL,
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "yoso": _SMALL,
}


def model_of(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A classifier of three labels, the same whenever it is made."""
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    config = transformers.AutoConfig.for_model(kind, **{"vocab_size": 128, **special, "num_labels": 3, **CONFIGS[kind]})
    config._experts_implementation = "eager"  # the grouped one has no fp64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = transformers.AutoModelForSequenceClassification.from_config(config)
    return model.to(dtype)


def tokenizer_of(kind: str) -> Any:
    """A word in a token, between a first and a last one."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    inputs = ["input_ids"] if kind == "fnet" else ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_input_names=inputs
    )
