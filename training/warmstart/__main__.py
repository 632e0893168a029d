"""`python -m training.warmstart OUTPUT`: train the tiny model on search traces.

One process on a CPU: batches of traces of similar length, no autocast. Traces are written as they are needed, so no
batch repeats; instances come from the train split alone. Muon trains the hidden matrices, AdamW the rest.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from ..evaluation.evaluate import evaluate
from ..recipe import Eval
from ..tasks.countdown import Countdown
from ..tasks.countdown.instances import Puzzle, split
from ..tasks.countdown.prompts import tiny_prompt
from ..tasks.countdown.trace import MAX_TOKENS, draw_style, write_trace
from .model import build_model, build_tokenizer

VERDICT_WEIGHT = 5.0  # loss weight: one token in seven, hard to learn, and the search depends on it
ANSWER_WEIGHT = 2.0
MAX_NEW_TOKENS = MAX_TOKENS + 12  # of a response in the evaluation: the longest trace and a margin
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # input_ids, attention_mask, loss weights; (B, T) each


def encode(
    instances: list[Puzzle], tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> list[tuple[list[int], list[float]]]:
    """One fresh trace an instance: token ids of prompt, trace and end, and the loss weight of each token."""
    verdict_ids = set(tokenizer.convert_tokens_to_ids(["lo", "hi", "ok"]))
    answer_id = tokenizer.convert_tokens_to_ids("answer")
    encoded = []
    for instance in instances:
        numbers = rng.sample(instance["numbers"], len(instance["numbers"]))
        prompt = tokenizer(tiny_prompt(numbers, instance["target"]))["input_ids"]
        trace = tokenizer(write_trace(numbers, instance["target"], draw_style(rng), rng))["input_ids"]
        start = trace.index(answer_id)
        weights = [VERDICT_WEIGHT if token in verdict_ids else 1.0 for token in trace[:start]]
        # The word `answer` itself keeps weight 1: more would teach the model to give up more often than the traces
        # do (measured: weight 2 cut responses from 53 to 35 tokens). What follows it is determined by the search.
        weights += [1.0, *[ANSWER_WEIGHT] * (len(trace) - start)]
        encoded.append(([*prompt, *trace, tokenizer.eos_token_id], [0.0] * len(prompt) + weights))
    return encoded


def batches(
    pool: list[list[Puzzle]], tokenizer: PreTrainedTokenizerBase, size: int, rng: random.Random
) -> Iterator[Batch]:
    """Endless batches: half three-number, half four-number instances, traces of similar length together."""
    per_pool = 8 * size // len(pool)
    while True:
        traces = encode([rng.choice(part) for part in pool for _ in range(per_pool)], tokenizer, rng)
        traces.sort(key=lambda trace: len(trace[0]))
        drawn = [traces[i : i + size] for i in range(0, len(traces), size)]
        rng.shuffle(drawn)
        for batch in drawn:
            length = len(batch[-1][0])
            ids = torch.full((len(batch), length), tokenizer.pad_token_id)
            weights = torch.zeros(len(batch), length)
            for batch_row, (tokens, token_weights) in enumerate(batch):
                ids[batch_row, : len(tokens)] = torch.tensor(tokens)
                weights[batch_row, : len(tokens)] = torch.tensor(token_weights)
            yield ids, (ids != tokenizer.pad_token_id).long(), weights


def optimizers(model: Qwen3ForCausalLM, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(args: argparse.Namespace) -> None:
    """Train for `args.steps`, evaluate on the validation split, save model, tokenizer and provenance."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rng = random.Random(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, hidden=args.hidden, layers=args.layers, heads=args.heads)
    pool = [split("train", 2_200, 3, level="tiny"), split("train", 12_000, 4, level="tiny")]
    task = Countdown(Countdown.Settings("countdown"))
    validation = task.instances("validation", args.validation)
    stream = batches(pool, tokenizer, args.batch, rng)
    optims = optimizers(model, args.muon_lr, args.adam_lr)
    parts = [part for optim in optims for part in optim.param_groups]
    peaks = [part["lr"] for part in parts]

    begin, smooth = time.monotonic(), 0.0
    for step in range(1, args.steps + 1):
        # Warm up over the first 1%, hold, and decay linearly to zero over the last 40% of the steps.
        progress = step / args.steps
        factor = min(1.0, progress / 0.01, (1.0 - progress) / 0.4)
        for part, peak in zip(parts, peaks, strict=True):
            part["lr"] = peak * factor
        ids, mask, weights = next(stream)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        loss.backward()
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        smooth = loss.item() if step == 1 else 0.98 * smooth + 0.02 * loss.item()
        if step % args.log_every == 0:
            print(f"{time.monotonic() - begin:6.0f} s  step {step:5d}  loss {smooth:.4f}", flush=True)

    figures = {
        kind: evaluate(
            model, tokenizer, task, validation, Eval(), max_new_tokens=MAX_NEW_TOKENS, temperature=temperature
        ).summary()
        for kind, temperature in (("sampled", 1.0), ("greedy", 0.0))
    }
    print(json.dumps(figures, indent=1))
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    provenance = {
        "command": "python -m training.warmstart OUTPUT "
        + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items()),
        "seconds": round(time.monotonic() - begin),
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "validation": figures,
    }
    (args.output / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m training.warmstart", description=__doc__)
    parser.add_argument("output", type=Path, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=2_400, help="about a quarter of a second each on one thread")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32, help="traces a step")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--validation", type=int, default=512, help="instances of the final evaluation")
    parser.add_argument("--log-every", type=int, default=50)
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
