"""What `rhythm_kernels.integrations.trl` rests on in TRL, as rules over the source of a release.

`test_trl_contract.py` holds the installed TRL to them, `every_trl.py` every release that pyproject.toml allows. A rule
is a function of a release: its first line says what holds, and a `BrokenError` what does not.
"""

from __future__ import annotations

import ast
from collections.abc import Callable

from .trl_source import (
    GENERATE,
    LOSS,
    PASS,
    PASSES,
    BrokenError,
    Function,
    Release,
    around,
    calls,
    need,
    need_text,
    need_value,
    nodes,
    text,
    values,
    without_docstring,
)

LOSSES = {"bnpo", "cispo", "dapo", "dr_grpo", "grpo", "luspo", "sapo", "vespo"}
LEVELS = {"sequence", "token"}


def of_whole_batch(function: Function, call: ast.Call, model: str, tokens: str) -> None:
    """A pass's first arguments: the model, prompts and completions beside each other, and how many logits count."""
    first = [text(argument) for argument in call.args[:4]]
    wanted = [model, tokens, "attention_mask", "logits_to_keep"]
    need(first == wanted, f"{function.name} hands {PASS} ({', '.join(first)}), not ({', '.join(wanted)}, ...)")
    need_value(function, tokens, "torch.cat([prompt_ids, completion_ids], dim=1)")
    need_value(function, "attention_mask", "torch.cat([prompt_mask, completion_mask], dim=1)")
    need_value(function, "logits_to_keep", "completion_ids.size(1)")


def methods_take_what_they_are_handed(trl: Release) -> None:
    """The overridden methods take the arguments that are handed on to them, in that order."""
    wanted = {
        GENERATE: ["self", "inputs"],
        LOSS: ["self", "model", "inputs"],
        PASS: ["self", "model", "input_ids", "attention_mask", "logits_to_keep"],
        "_get_train_sampler": ["self", "dataset"],
        "_save_checkpoint": ["self", "model", "trial"],
    }
    for name, names in wanted.items():
        method = trl[name]
        if name == PASS and method.args.vararg:  # it hands all on
            method = trl[PASSES[1]]
        found = [argument.arg for argument in method.args.args]
        exact = name != PASS
        need(found == names if exact else found[:5] == names, f"{name} takes ({', '.join(found)})")


def a_loss_is_of_one_pass_over_its_batch(trl: Release) -> None:
    """`_compute_loss` makes one log-prob pass, over all tokens of its inputs, and takes log-probs, then entropies."""
    loss = trl[LOSS]
    found = calls(loss, f"self.{PASS}")
    need(len(found) == 1, f"{LOSS} calls {PASS} {len(found)} times")
    of_whole_batch(loss, found[0], "model", "input_ids")
    for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"):
        need_value(loss, name, f"inputs['{name}']")
    (taken,) = (assign.targets[0] for assign in nodes(loss, ast.Assign) if assign.value is found[0])
    need(text(taken).strip("()").startswith("per_token_logps, entropies"), f"{LOSS} takes {text(taken)} from the pass")


def a_pass_returns_log_probs_then_entropies(trl: Release) -> None:
    """A log-prob pass returns log-probs, then entropies."""
    made = trl[PASSES[1]] if trl[PASS].args.vararg else trl[PASS]
    for back in nodes(made, ast.Return):
        found = text(back.value).strip("()")
        need(found.startswith("logps, entropies"), f"{made.name} returns {found}")


def a_loss_asks_its_inputs_by_name(trl: Release) -> None:
    """`_compute_loss` reads its inputs by `[...]`, `get` and `in` alone, so that a mapping may stand in for them."""
    loss = trl[LOSS]
    asked = [x.value for kind in (ast.Subscript, ast.Attribute) for x in nodes(loss, kind)]
    asked = [x for x in asked if isinstance(x, ast.Name)] + [y for x in nodes(loss, ast.Compare) for y in x.comparators]
    for name in nodes(loss, ast.Name):
        need(name.id != "inputs" or any(name is x for x in asked), f"line {name.lineno} takes inputs as a whole")
    other = {x.attr for x in nodes(loss, ast.Attribute) if text(x.value) == "inputs"} - {"get"}
    need(not other, f"{LOSS} reads inputs by {', '.join(sorted(other))}")


def advantages_are_read_after_the_forward(trl: Release) -> None:
    """`_compute_loss` reads `inputs["advantages"]` after its log-prob pass, in which gamma is measured."""
    loss = trl[LOSS]
    (forward,) = calls(loss, f"self.{PASS}")
    read = [x for x in nodes(loss, ast.Constant) if x.value == "advantages"]
    need(read, f"{LOSS} does not read inputs['advantages']")
    need(all(x.lineno > forward.lineno for x in read), f"{LOSS} reads the advantages before its forward")


def advantages_of_tokens_are_used_as_they_are(trl: Release) -> None:
    """In `_compute_loss` one advantage a response is spread over its tokens; `(B, T)` advantages stay as they are."""
    loss = trl[LOSS]
    found = values(loss, "advantages")
    need(found == ["inputs['advantages']", "advantages.unsqueeze(1)"], f"advantages become {found}")
    (spread,) = calls(loss, "advantages.unsqueeze")
    tests = [text(branch.test) for branch in around(loss, ast.If, spread)]
    need(tests == ["advantages.dim() == 1"], f"advantages are spread where {' and '.join(tests) or 'nothing is asked'}")


def tokens_of_tools_are_masked(trl: Release) -> None:
    """The response mask of a loss is the completion mask, without the tokens that `tool_mask` says a tool wrote."""
    mask = "completion_mask if 'tool_mask' not in inputs else completion_mask * inputs['tool_mask']"
    need_value(trl[LOSS], "mask", mask)


def losses_are_known(trl: Release) -> None:
    """Of every loss and level of importance sampling is known whether its gradient tells a response's tokens apart."""
    for name, known in (("loss_type", LOSSES), ("importance_sampling_level", LEVELS)):
        asked = [x for x in nodes(trl[LOSS], ast.Compare) if text(x.left) == f"self.{name}"]
        found = {x.value for one in asked for place in one.comparators for x in nodes(place, ast.Constant)}
        need(found, f"{LOSS} does not ask for {name}")
        need(found <= known, f"{name} may be {', '.join(sorted(found - known))}, which nobody looked at")


def no_other_loss_is_taken(trl: Release) -> None:
    """A loss is `_compute_loss`, unless there is a `compute_liger_loss`, with which `use_liger_kernel` is refused."""
    for back in nodes(trl["compute_loss"], ast.Return):
        if "self._compute_loss" in text(back.value):  # also redirected, through a wrapped model
            continue
        tests = [text(branch.test) for branch in around(trl["compute_loss"], ast.If, back)]
        liger = tests == ["self.use_liger_kernel"] and "self.compute_liger_loss" in text(back.value)
        need(liger and "compute_liger_loss" in trl.functions, f"compute_loss returns {text(back.value)}")


def old_log_probs_are_made_when_we_think(trl: Release) -> None:
    """The old-log-prob pass comes first, of the whole batch, and where the policy changes or vLLM's is corrected."""
    generate = trl[GENERATE]
    found = calls(generate, f"self.{PASS}")
    need(found, f"{GENERATE} makes no log-prob pass")
    of_whole_batch(generate, found[0], "self.model", "prompt_completion_ids")
    need_value(generate, "generate_every", "self.args.steps_per_generation * self.num_iterations")
    vllm = "(self.use_vllm and self.vllm_importance_sampling_correction)"
    wanted = f"self.args.gradient_accumulation_steps % generate_every != 0 or {vllm}"
    tests = [text(branch.test) for branch in around(generate, ast.If, found[0])]
    need(tests == [wanted], f"old log-probs are made where {' and '.join(tests) or 'nothing is asked'}")
    (taken,) = (assign.targets[0] for assign in nodes(generate, ast.Assign) if assign.value is found[0])
    need(text(taken).strip("()").startswith("old_per_token_logps,"), f"the first pass gives {text(taken)}")
    without = [text(item.context_expr) for one in around(generate, ast.With, found[0]) for item in one.items]
    need("torch.no_grad()" in without, "old log-probs are made with gradients")
    for call in found[1:]:
        tests = [text(branch.test) for branch in around(generate, ast.If, call)]
        need("self.beta != 0.0" in tests[:1], f"a pass that is no reference's: {text(call)}")


def a_generation_has_the_names_we_read(trl: Release) -> None:
    """The generation batch has tokens, masks, advantages and, where they are made, old log-probs and `tool_mask`."""
    generate = trl[GENERATE]
    need({text(back.value) for back in nodes(generate, ast.Return)} == {"output"}, f"{GENERATE} returns no output")
    first = [x.value for x in nodes(generate, ast.Assign) if text(x.targets[0]) == "output"]
    always = {key.value for x in first if isinstance(x, ast.Dict) for key in x.keys}
    names = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages"}
    need(names <= always, f"the batch may be without {', '.join(sorted(names - always))}")
    for name in ("old_per_token_logps", "tool_mask"):
        need(values(generate, f"output['{name}']") == [name], f"{name} is not put into the batch")
    need("if old_per_token_logps is not None" in text(generate), "there are old log-probs where none were made")


def a_pass_names_its_images(trl: Release) -> None:
    """What a loss hands its pass of images is named by the methods that make one, so that ours hand on the same."""
    taken = {x.arg for one in PASSES if one in trl.functions for x in (*trl[one].args.args, *trl[one].args.kwonlyargs)}
    (forward,) = calls(trl[LOSS], f"self.{PASS}")
    images = [keyword.arg for keyword in forward.keywords if text(keyword.value).startswith("inputs.get(")]
    need("pixel_values" in images, f"{LOSS} hands no pixel_values on")
    for name in (*images, "batch_size", "compute_entropy"):
        need(name in taken, f"no pass names {name}")


def generations_are_buffered_as_we_save_them(trl: Release) -> None:
    """A batch is generated every `steps_per_generation * num_iterations` steps and kept in `_buffered_inputs`."""
    need_value(trl["_prepare_inputs"], "generate_every", "self.args.steps_per_generation * self.num_iterations")
    need_text(
        trl["_prepare_inputs"],
        "self._step % generate_every == 0 or self._buffered_inputs is None",
        "self._buffered_inputs[self._step % self.args.steps_per_generation]",
        f"self.{GENERATE}(generation_batch)",
    )
    need_text(trl["training_step"], "self._step += 1")
    need_value(trl["__init__"], "self._step", "0")
    need_value(trl["__init__"], "self._buffered_inputs", "None")


def entries_that_we_add_are_carried(trl: Release) -> None:
    """Shuffling and splitting of a generation batch ask for no entry by name, so gamma goes where its tokens go."""
    need_text(trl["_prepare_inputs"], "shuffle_sequence_dict(generation_batch)")
    for name in ("shuffle_sequence_dict", "split_tensor_dict"):
        named = [x.value for line in without_docstring(trl[name]) for x in nodes(line, ast.Constant)]
        need(not any(isinstance(x, str) for x in named), f"{name} knows entries by name: {named}")


def attributes_are_set(trl: Release) -> None:
    """`__init__` sets what is read of a trainer."""
    for name in ("num_iterations", "use_vllm", "vllm_importance_sampling_correction"):
        need_value(trl["__init__"], f"self.{name}", f"args.{name}")
    need_value(trl["__init__"], "self._metrics", "{'train': defaultdict(list), 'eval': defaultdict(list)}")
    need(values(trl["__init__"], "self.ref_model"), "__init__ sets no ref_model")


def questions_are_drawn_as_we_replay_them(trl: Release) -> None:
    """Each pass over the questions draws one permutation from the sampler's own generator, which no epoch sets."""
    need(calls(trl["_get_train_sampler"], "RepeatSampler"), "_get_train_sampler makes no RepeatSampler")
    drawn = [text(call) for call in nodes(trl["RepeatSampler.__iter__"], ast.Call) if "generator" in text(call)]
    need(drawn and min(drawn, key=len) == "torch.randperm(self.num_samples, generator=self.generator)", f"{drawn}")
    need("RepeatSampler.set_epoch" not in trl.functions, "RepeatSampler has a set_epoch")


def checkpoints_are_written_by_super(trl: Release) -> None:
    """`_save_checkpoint` lets transformers write the checkpoint."""
    need_text(trl["_save_checkpoint"], "super()._save_checkpoint(model, trial)")


RULES: tuple[Callable[[Release], None], ...] = (
    methods_take_what_they_are_handed,
    a_loss_is_of_one_pass_over_its_batch,
    a_pass_returns_log_probs_then_entropies,
    a_loss_asks_its_inputs_by_name,
    advantages_are_read_after_the_forward,
    advantages_of_tokens_are_used_as_they_are,
    tokens_of_tools_are_masked,
    losses_are_known,
    no_other_loss_is_taken,
    old_log_probs_are_made_when_we_think,
    a_generation_has_the_names_we_read,
    a_pass_names_its_images,
    generations_are_buffered_as_we_save_them,
    entries_that_we_add_are_carried,
    attributes_are_set,
    questions_are_drawn_as_we_replay_them,
    checkpoints_are_written_by_super,
)


def broken(trl: Release) -> list[str]:
    """The rules that do not hold, each with what does not."""
    found = []
    for rule in RULES:
        try:
            rule(trl)
        except (BrokenError, ValueError) as error:  # ValueError: not the one call that another rule asks for
            words = str(error) if isinstance(error, BrokenError) else f"what it is about was not found ({error})"
            found.append(f"{(rule.__doc__ or '').strip()} But {words}.")
    return found
