"""Prompts and end tokens in evaluation are those of training, whatever a tokenizer adds of its own."""

from __future__ import annotations

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from rhythm_kernels import RhythmSettings
from training.evaluation.evaluate import evaluate
from training.evaluation.generate import Decoding, answer, ends
from training.evaluation.summary import Evaluation, Response
from training.models import check_model
from training.pages.examples import _inputs, examples
from training.recipe import load_recipe
from training.reference_loop import sample
from training.stand_in import byte_tokenizer, random_model, small_config
from training.task import Task, TaskSettings, asked

from .runs import TINY

CHAT = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"


class Both(Task):
    """Half of the prompts are text, half are chats."""

    def instances(self, split, size):
        return [{"n": n} for n in range(size)]

    def prompt(self, instance):
        text = f"question {instance['n']}"
        return text if instance["n"] % 2 else [{"role": "user", "content": text}]

    def correct(self, response, instance):
        return True


def adding(template, end=False):
    """A tokenizer that puts a token before every text, and perhaps one behind it, as those of Llama and Gemma do."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.split_special_tokens = False
    tokenizer.chat_template = template
    single = "<bos> $A <eos>" if end else "<bos> $A"
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=tokens)
    return tokenizer


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    return random_model(LlamaForCausalLM, small_config(LlamaConfig(), 260, known=False), adding(CHAT))


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("template", [CHAT, CHAT.removeprefix("{{ bos_token }}")])
def test_prompts_are_those_of_training(model, monkeypatch, template, end):
    """What TRL's `_tokenize_prompts` makes of text and of chats: a template's special tokens are not added again."""
    tokenizer, task = adding(template, end), Both(TaskSettings("both"))
    instances = task.instances("test", 4)
    wanted = []
    for prompt in map(task.prompt, instances):
        if isinstance(prompt, str):
            wanted.append(tokenizer(text=[prompt])["input_ids"][0])
        else:
            chat = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
            wanted.append(tokenizer.apply_chat_template(conversation=[prompt], **chat)["input_ids"][0])
    found = asked(task, instances, tokenizer)
    assert [prompt.tokens for prompt in found] == wanted
    assert found[0].text.removeprefix("<bos>") == "[user] question 0\n" and found[1].text == "question 1"
    assert _inputs(found[0].tokens, [5, 6], model)["input_ids"].tolist() == [[*wanted[0], 5, 6]]

    read = []
    inner = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: read.append(given) or inner(**given))
    recipe = load_recipe(TINY, ["eval.batch_size=8"])
    check_model(recipe, model, tokenizer, task, instances)
    evaluate(model, tokenizer, task, instances, recipe.eval, max_new_tokens=2, temperature=1.0)
    sample(model, tokenizer, [prompt.tokens for prompt in found], 1, 2, 1.0)
    for given, order in zip(read, ([0, 1], [1, 3, 0, 2], [0, 1, 2, 3]), strict=True):
        pairs = zip(given["input_ids"].tolist(), given["attention_mask"].tolist())
        assert [[token for token, live in zip(*pair) if live] for pair in pairs] == [wanted[i] for i in order]


@pytest.mark.parametrize("own", [None, 9, [9, 8]])
def test_responses_end_where_those_of_training_do(model, monkeypatch, own):
    """At the tokenizer's end token too, as TRL has it, where the model's generation_config has none or others."""
    tokenizer = adding(CHAT)
    monkeypatch.setattr(model.generation_config, "eos_token_id", own)
    wanted = {tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])}
    assert ends(model, tokenizer) == wanted
    for last in wanted:
        at = torch.tensor(last)
        hook = model.lm_head.register_forward_hook(lambda _, __, logits, at=at: (0 * logits).index_fill(-1, at, 99.0))
        try:
            assert answer(model, tokenizer, [[1, 2], [3]], Decoding(4, 0.0)) == [[last], [last]]
            found = sample(model, tokenizer, [[1, 2], [3]], 1, 4, 0.01)
        finally:
            hook.remove()
        assert found.input_ids[found.response_mask].tolist() == [last, last]


def test_tokens_that_the_tokenizer_has_not(model):
    """A model's vocabulary is often padded beyond its tokenizer's, and such a token may be sampled."""
    tokenizer, task = adding(CHAT), Both(TaskSettings("both"))
    instances, tokens = task.instances("test", 1), [5, 259, 6, 7, 8, 9]
    assert tokenizer.convert_ids_to_tokens(259) is None
    answers = Evaluation([Response(0, 0, "x", 6, False, {"correctness": 1.0}, tokens)])
    (shown,) = examples(model, tokenizer, task, instances, answers, answers, RhythmSettings(), None)
    assert shown["tokens"][1] == "<259>" and len(shown["tokens"]) == len(shown["gamma"]) == 6
