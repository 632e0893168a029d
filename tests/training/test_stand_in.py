"""Small random models of transformers' classes, and the tokenizer of bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, Qwen3Config

from rhythm_kernels.probe.structure import attention_layers, find_decoder
from training.models import load
from training.recipe import RecipeError, load_recipe
from training.stand_in import byte_tokenizer, class_of, parameters, random_model, small_config, stand_in

from .runs import TINY

BYTES = byte_tokenizer()
CLASSES = [
    *("Qwen3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Gemma3ForCausalLM", "GptOssForCausalLM"),
    *("Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "GPT2LMHeadModel", "Qwen3_5ForCausalLM"),
]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back_from_bytes(text):
    ids = BYTES(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert BYTES.decode(ids) == text
    assert BYTES.decode(ids, skip_special_tokens=True) == text


def test_the_names_of_special_tokens_are_text(tmp_path):
    BYTES.save_pretrained(tmp_path)
    for tokenizer in (BYTES, AutoTokenizer.from_pretrained(tmp_path)):
        ids = tokenizer("a<eos><pad>")["input_ids"]
        assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "a<eos><pad>"


def test_prompts_are_padded_on_the_left_and_chats_are_lines():
    batch = BYTES(["ab", "abc"], padding=True)
    assert batch["attention_mask"] == [[0, 1, 1], [1, 1, 1]]
    assert batch["input_ids"][0][0] == BYTES.pad_token_id
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    write = BYTES.apply_chat_template
    assert write(chat, tokenize=False) == "[system]\nBe brief.\n[user]\n1 + 1?\n"
    assert write(chat, tokenize=False, add_generation_prompt=True).endswith("[user]\n1 + 1?\n[assistant]\n")


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_is_made_small(name):
    model, tokenizer = stand_in(name)
    assert type(model).__name__ == name
    assert sum(p.numel() for p in model.parameters()) < 3e6
    decoder = find_decoder(model)
    assert decoder.num_layers >= 4
    assert attention_layers(decoder, "middle5")
    torch.rand(1)  # the caller's random state is neither read nor moved
    again, _ = stand_in(name)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    ids = torch.tensor([tokenizer("A question?")["input_ids"]])
    made = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert made.shape[1] > ids.shape[1]
    kinds = getattr(model.config, "layer_types", None)
    if kinds:
        assert set(kinds) == set(type(model).config_class().layer_types)


def test_the_switches_of_a_known_configuration_stay():
    """What the real model shares and ties, the small one does; its positions are those of the real one."""
    real = Qwen3Config(
        num_attention_heads=8,
        num_key_value_heads=8,
        num_hidden_layers=12,
        tie_word_embeddings=True,
        max_position_embeddings=1000,
        attention_bias=True,
    )
    small = small_config(real, 258, known=True)
    assert (small.num_attention_heads, small.num_key_value_heads) == (4, 4)
    assert (small.max_position_embeddings, small.tie_word_embeddings, small.attention_bias) == (1000, True, True)
    one = small_config(LlamaConfig(num_attention_heads=8, num_key_value_heads=1), 258, known=True)
    assert one.num_key_value_heads == 1
    assert small_config(LlamaConfig(), 258, known=False).num_key_value_heads == 2
    scaled = LlamaConfig(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    )
    assert small_config(scaled, 258, known=True).rope_parameters["rope_type"] == "llama3"
    random_model(class_of(real), small, BYTES)


def test_parameters_are_counted_without_making_them():
    small = small_config(Qwen3Config(), 258, known=False)
    made = sum(p.numel() for p in random_model(class_of(small), small, BYTES).parameters())
    assert parameters(small) == made
    assert parameters(Qwen3Config(num_hidden_layers=36, hidden_size=4096)) > 5e9


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Qwen3ForCausallM", r"model\.architecture must be a causal language model of transformers.*Qwen3ForCausalLM"),
        ("Qwen3Config", r"got 'Qwen3Config'"),
        ("T5ForConditionalGeneration", r"got 'T5ForConditionalGeneration'"),
        ("nonsense", r"for example Qwen3ForCausalLM"),
        ("BertLMHeadModel", r"a small BertLMHeadModel cannot be made: .*no layer of BertModel has causal softmax"),
        ("CTRLLMHeadModel", r"a small CTRLLMHeadModel cannot be made: .*parameters are left besides"),
        ("Mamba2ForCausalLM", r"a small Mamba2ForCausalLM cannot be made"),
    ],
)
def test_what_cannot_be_made_small_is_refused_by_name(name, message):
    with pytest.raises(RecipeError, match=message):
        stand_in(name)


def test_a_null_path_is_a_random_model(tmp_path):
    model, tokenizer = load(load_recipe(TINY, ["model.path=null", "model.architecture=Gemma3ForCausalLM"]))
    assert type(model).__name__ == "Gemma3ForCausalLM"
    assert len(tokenizer) == model.config.vocab_size == 258
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).architectures == ["Gemma3ForCausalLM"]
    with pytest.raises(RecipeError, match=r"model\.path must be a folder or a name on the hub, got None"):
        load(load_recipe(TINY, ["model.path=null"]))


def test_a_path_that_is_not_there_is_never_a_random_model():
    with pytest.raises(RecipeError, match=r"model: /nowhere/at/all cannot be loaded"):
        load(load_recipe(TINY, ["model.path=/nowhere/at/all", "model.architecture=Qwen3ForCausalLM"]))
