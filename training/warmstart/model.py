"""The tiny model, a Qwen3 of about a million parameters, and its tokenizer of some 120 words."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ..tasks.countdown.trace import LIMIT

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
_SYMBOLS = ["+", "-", "*", "/", "(", ")", "=", ",", ":"]
_WORDS = ["nums", "target", "use", "to", "make", "from", "lo", "hi", "ok", "answer", "none"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, one token an integer from 0 to `LIMIT`; no special token is added by itself.

    A word is what stands between spaces, and decoding joins words with single spaces, so that text and tokens
    are the same thing and the verifier reads what the model wrote. Prompts are padded on the left, as
    generation needs.
    """
    words = [PAD, EOS, UNKNOWN, *_SYMBOLS, *_WORDS, *(str(number) for number in range(LIMIT + 1))]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=256,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden: int = 128, layers: int = 6, heads: int = 8
) -> Qwen3ForCausalLM:
    """A fresh Qwen3 with tied embeddings and no head sharing, initialised from torch's global generator."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=256,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)
