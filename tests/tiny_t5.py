"""A T5 of a few thousand random weights over the words a..z, in a folder as any other model."""

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, T5Model


def tiny_t5(folder: Path, *, seed: int = 0, with_decoder: bool = True) -> Path:
    """Writes the model and a word-level tokenizer that ends texts with </s>; equal seeds give equal weights."""
    words = ["<pad>", "</s>", "<unk>", *string.ascii_lowercase, "Represent", "the", "text", "for", ":"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=64
    )
    config = T5Config(
        vocab_size=len(words),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        initializer_factor=8.0,
    )
    generator = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = T5Model(config) if with_decoder else T5EncoderModel(config)
    torch.random.set_rng_state(generator)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
