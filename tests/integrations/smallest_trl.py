"""The smallest TRL that keeps every rule of `trl_contract`, as source, and the alterations that break one each."""

from __future__ import annotations

from .trl_source import LOSS

TRAINER = '''
class GRPOTrainer(Trainer):
    def __init__(self, model, args):
        self.num_iterations = args.num_iterations
        self.use_vllm = args.use_vllm
        self.vllm_importance_sampling_correction = args.vllm_importance_sampling_correction
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._step = 0
        self._buffered_inputs = None
        self.ref_model = None

    def _get_train_sampler(self, dataset=None):
        return RepeatSampler(dataset, seed=self.args.seed)

    def training_step(self, model, inputs, num_items_in_batch):
        output = super().training_step(model, inputs, num_items_in_batch)
        self._step += 1
        return output

    def _prepare_inputs(self, generation_batch):
        generate_every = self.args.steps_per_generation * self.num_iterations
        if self._step % generate_every == 0 or self._buffered_inputs is None:
            generation_batch = self._generate_and_score_completions(generation_batch)
            generation_batch = shuffle_sequence_dict(generation_batch)
            self._buffered_inputs = split_tensor_dict(generation_batch, self.args.steps_per_generation)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep,
        batch_size=None, compute_entropy=False, pixel_values=None
    ):
        """Log-probs, and entropies."""
        logps, entropies = model(input_ids, attention_mask, pixel_values)
        return logps, entropies

    def _generate_and_score_completions(self, inputs):
        prompt_ids, prompt_mask, completion_ids, completion_mask, advantages = self._generate(inputs)
        prompt_completion_ids = torch.cat([prompt_ids, completion_ids], dim=1)
        attention_mask = torch.cat([prompt_mask, completion_mask], dim=1)
        logits_to_keep = completion_ids.size(1)
        with torch.no_grad():
            generate_every = self.args.steps_per_generation * self.num_iterations
            if self.args.gradient_accumulation_steps % generate_every != 0 or (
                self.use_vllm and self.vllm_importance_sampling_correction
            ):
                old_per_token_logps, _ = self._get_per_token_logps_and_entropies(
                    self.model, prompt_completion_ids, attention_mask, logits_to_keep
                )
            else:
                old_per_token_logps = None
            if self.beta != 0.0:
                reference, _ = self._get_per_token_logps_and_entropies(
                    self.ref_model, prompt_completion_ids, attention_mask, logits_to_keep
                )
        output = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": completion_ids,
            "completion_mask": completion_mask,
            "advantages": advantages,
        }
        if old_per_token_logps is not None:
            output["old_per_token_logps"] = old_per_token_logps
        if self.tools:
            output["tool_mask"] = tool_mask
        return output

    def compute_loss(self, model, inputs, return_outputs=False):
        if self.use_liger_kernel:
            return self.redirect(model, self.compute_liger_loss, inputs)
        return self._compute_loss(model, inputs)

    def compute_liger_loss(self, model, inputs):
        pass

    def _compute_loss(self, model, inputs):
        prompt_ids, prompt_mask = inputs["prompt_ids"], inputs["prompt_mask"]
        completion_ids, completion_mask = inputs["completion_ids"], inputs["completion_mask"]
        input_ids = torch.cat([prompt_ids, completion_ids], dim=1)
        attention_mask = torch.cat([prompt_mask, completion_mask], dim=1)
        logits_to_keep = completion_ids.size(1)
        mask = completion_mask if "tool_mask" not in inputs else completion_mask * inputs["tool_mask"]
        per_token_logps, entropies = self._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, pixel_values=inputs.get("pixel_values")
        )
        advantages = inputs["advantages"]
        if advantages.dim() == 1:
            advantages = advantages.unsqueeze(1)
        if self.importance_sampling_level == "token" and self.loss_type in ["grpo", "dapo"]:
            return -(per_token_logps * advantages * mask).sum()

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
'''
UTILS = '''
class RepeatSampler(Sampler):
    def __iter__(self):
        yield from torch.randperm(self.num_samples, generator=self.generator).tolist()


def shuffle_sequence_dict(batch):
    """All alike."""
    order = torch.randperm(len(next(iter(batch.values()))))
    return {name: entry[order] for name, entry in batch.items()}


def split_tensor_dict(batch, parts):
    return [{name: entry.chunk(parts)[i] for name, entry in batch.items()} for i in range(parts)]
'''
READ = '        advantages = inputs["advantages"]\n'
FORWARD = "        per_token_logps, entropies = self._get_per"

# Rule -> what is altered, into what, and what is said of it.
ALTERED = [
    ("methods_take", "def _compute_loss(self, model, inputs)", "def _compute_loss(self, model, inputs, step)", LOSS),
    ("methods_take", "def _compute_loss(", "def _loss(", "there is no _compute_loss"),
    ("methods_take", "        self, model, input_ids,", "        self, model, prompts, input_ids,", "takes .*prompts"),
    (
        "methods_take",
        "self, model, input_ids, attention_mask, logits_to_keep,\n",
        "self, model, *args,\n",
        "no _full_logits",
    ),
    ("methods_take", "(self, model, trial)", "(self, model, trial, metrics)", "_save_checkpoint takes"),
    ("a_loss_is_of_one_pass", FORWARD, FORWARD.replace("logps, ent", "logps, other, ent"), "takes .*other"),
    (
        "a_loss_is_of_one_pass",
        "model, input_ids, attention_mask, logits_to_keep, pixel",
        "model, input_ids, pixel",
        "hands",
    ),
    (
        "a_loss_is_of_one_pass",
        "input_ids = torch.cat([prompt_ids, completion_ids]",
        "input_ids = torch.cat([completion_ids]",
        "is torch.cat",
    ),
    (
        "a_loss_is_of_one_pass",
        READ,
        READ + "        self._get_per_token_logps_and_entropies(model)\n",
        "calls .* 2 times",
    ),
    ("a_pass_returns", "return logps, entropies", "return entropies, logps", "returns entropies, logps"),
    ("a_loss_asks", READ, READ + "        inputs = {**inputs}\n", "takes inputs as a whole"),
    ("a_loss_asks", READ, READ + "        self.note(inputs)\n", "takes inputs as a whole"),
    ("a_loss_asks", READ, READ + '        inputs.pop("x")\n', "reads inputs by pop"),
    ("advantages_are_read_after", FORWARD, READ + FORWARD, "before its forward"),
    ("advantages_are_read_after", READ, '        advantages = inputs["rewards"]\n', "does not read"),
    (
        "advantages_of_tokens",
        "            advantages = advantages.unsqueeze(1)",
        "            pass",
        "advantages become",
    ),
    ("advantages_of_tokens", READ, READ + "        advantages = advantages.mean(1)\n", r"advantages become .*mean"),
    ("advantages_of_tokens", "if advantages.dim() == 1:", "if True:", "spread where True"),
    ("tokens_of_tools", ' * inputs["tool_mask"]', "", "mask is"),
    ("losses_are_known", '["grpo", "dapo"]', '["grpo", "new"]', "loss_type may be new, which nobody looked at"),
    ("losses_are_known", '_level == "token"', '_level == "turn"', "importance_sampling_level may be turn"),
    ("no_other_loss", "if self.use_liger_kernel:", "if self.use_new_kernel:", "compute_loss returns self.redirect"),
    ("no_other_loss", "def compute_liger_loss(", "def compute_liger(", "compute_loss returns self.redirect"),
    ("old_log_probs", "% generate_every != 0 or", "% generate_every == 0 or", "old log-probs are made where"),
    (
        "old_log_probs",
        "steps_per_generation * self.num_iterations\n            if self.args",
        "steps_per_generation\n            if self.args",
        "generate_every is",
    ),
    ("old_log_probs", "with torch.no_grad():", "with torch.enable_grad():", "with gradients"),
    ("old_log_probs", "if self.beta != 0.0:", "if self.distils:", "no reference's"),
    ("old_log_probs", "                    self.model, prompt", "                    self.ref_model, prompt", "hands"),
    ("old_log_probs", "old_per_token_logps, _ =", "_, old_per_token_logps =", "the first pass gives"),
    ("a_generation_has", '            "completion_mask": completion_mask,\n', "", "without completion_mask"),
    ("a_generation_has", 'output["tool_mask"] =', 'output["tools"] =', "tool_mask is not put"),
    ("a_generation_has", "if old_per_token_logps is not None:", "if True:", "where none were made"),
    ("a_pass_names", "compute_entropy=False, pixel_values=None", "compute_entropy=False", "no pass names pixel_values"),
    ("a_pass_names", "batch_size=None, ", "", "no pass names batch_size"),
    (
        "generations_are",
        "self._buffered_inputs[self._step % self.args.steps_per_generation]",
        "self._buffered_inputs.pop()",
        "has no",
    ),
    ("generations_are", "self._step += 1", "self._count += 1", "training_step has no"),
    ("generations_are", "self._buffered_inputs = None\n", "self._buffered_inputs = []\n", r"is \[\], not None"),
    (
        "entries_that_we_add",
        "for name, entry in batch.items()}\n",
        'for name, entry in batch.items() if name != "x"}\n',
        "by name",
    ),
    ("attributes_are_set", "self.num_iterations = args", "self.iterations = args", "num_iterations is not set"),
    ("attributes_are_set", "defaultdict(list)}", "defaultdict(float)}", "_metrics is"),
    ("attributes_are_set", "self.ref_model = None", "pass", "ref_model"),
    (
        "questions_are_drawn",
        "generator=self.generator",
        "generator=None",
        r"randperm\(self.num_samples, generator=None",
    ),
    (
        "questions_are_drawn",
        "    def __iter__(self):",
        "    def set_epoch(self, epoch):\n        pass\n\n    def __iter__(self):",
        "set_epoch",
    ),
    ("checkpoints_are", "super()._save_checkpoint(model, trial)", "self.save(model)", "has no"),
]
