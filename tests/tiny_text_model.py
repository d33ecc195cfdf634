"""A random model with a tokenizer, saved where the command line can load it: any text is a token a byte."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LAYERS, D_MODEL, POSITIONS = 3, 32, 512
#: Tokens of their own, which would be markup if a page or a terminal took them for it.
MARKUP = ["</script>", "<b>", "&amp;", "[red]"]


def make():
    """The model and the tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(MARKUP)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=D_MODEL,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval(), fast


def save(folder):
    """Write both to ``folder``; returns them."""
    model, tokenizer = make()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return model, tokenizer
