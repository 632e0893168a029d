"""`python -m training.warmstart OUTPUT`: train the tiny model on search traces, until the time is up.

Single process, made for a CPU: batches of similar length, no autocast. Traces are written on the fly, so no
two batches repeat; instances come from the train split alone. Muon moves the hidden matrices, AdamW the rest.
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

from ..tasks.countdown import Instance, split, tiny_prompt
from ..tasks.countdown_trace import draw_style, write_trace
from .evaluation import evaluate
from .model import build_model, build_tokenizer

VERDICT_WEIGHT, ANSWER_WEIGHT = (
    5.0,
    2.0,
)  # loss weights; a verdict is one token in seven and decides the answer
Batch = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor
]  # input_ids, attention_mask, loss weights; (B, T) each


def encode(
    instances: list[Instance], tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> list[tuple[list[int], list[float]]]:
    """One fresh trace an instance: token ids of prompt, trace and end, and the loss weight of each token."""
    verdict_ids = set(tokenizer.convert_tokens_to_ids(["lo", "hi", "ok"]))
    answer_id = tokenizer.convert_tokens_to_ids("answer")
    rows = []
    for instance in instances:
        numbers = rng.sample(instance["numbers"], len(instance["numbers"]))
        prompt = tokenizer(tiny_prompt(numbers, instance["target"]))["input_ids"]
        trace = tokenizer(write_trace(numbers, instance["target"], draw_style(rng), rng))["input_ids"]
        start = trace.index(answer_id)
        weights = [VERDICT_WEIGHT if token in verdict_ids else 1.0 for token in trace[:start]]
        weights += [ANSWER_WEIGHT] * (len(trace) - start + 1)
        rows.append(([*prompt, *trace, tokenizer.eos_token_id], [0.0] * len(prompt) + weights))
    return rows


def batches(
    pool: list[list[Instance]], tokenizer: PreTrainedTokenizerBase, size: int, rng: random.Random
) -> Iterator[Batch]:
    """Endless batches: half three-number, half four-number instances, rows of similar length together."""
    per_pool = 8 * size // len(pool)
    while True:
        rows = encode([rng.choice(part) for part in pool for _ in range(per_pool)], tokenizer, rng)
        rows.sort(key=lambda row: len(row[0]))
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        rng.shuffle(chunks)
        for chunk in chunks:
            length = len(chunk[-1][0])
            ids = torch.full((len(chunk), length), tokenizer.pad_token_id)
            weights = torch.zeros(len(chunk), length)
            for row, (tokens, token_weights) in enumerate(chunk):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                weights[row, : len(tokens)] = torch.tensor(token_weights)
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
    """Train for `args.minutes`, evaluate on the validation split, save model, tokenizer and provenance."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rng = random.Random(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, hidden=args.hidden, layers=args.layers, heads=args.heads)
    pool = [split("train", 2_200, 3, level="tiny"), split("train", 12_000, 4, level="tiny")]
    validation = split("validation", 512, (3, 4), level="tiny")
    stream = batches(pool, tokenizer, args.batch, rng)
    optims = optimizers(model, args.muon_lr, args.adam_lr)
    peaks = [group["lr"] for optim in optims for group in optim.param_groups]

    begin, step, smooth = time.monotonic(), 0, 0.0
    budget = 60.0 * args.minutes
    while (elapsed := time.monotonic() - begin) < budget:
        # Warm up over the first 1%, hold, and decay linearly to zero over the last 40% of the time.
        progress = elapsed / budget
        factor = min(1.0, (progress + 1e-3) / 0.01, (1.0 - progress) / 0.4)
        for group, peak in zip((g for o in optims for g in o.param_groups), peaks, strict=True):
            group["lr"] = peak * factor
        ids, mask, weights = next(stream)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        loss.backward()
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        step += 1
        smooth = loss.item() if step == 1 else 0.98 * smooth + 0.02 * loss.item()
        if step % args.log_every == 0:
            print(f"{elapsed:6.0f} s  step {step:5d}  loss {smooth:.4f}", flush=True)
        if args.eval_every and step % args.eval_every == 0:
            print(json.dumps(evaluate(model, tokenizer, validation[:256])), flush=True)

    figures = {
        "sampled": evaluate(model, tokenizer, validation),
        "greedy": evaluate(model, tokenizer, validation, temperature=0.0),
    }
    print(json.dumps(figures, indent=1))
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    provenance = {
        "command": "python -m training.warmstart OUTPUT "
        + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items()),
        "steps": step,
        "seconds": round(time.monotonic() - begin),
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "validation_512": figures,
    }
    (args.output / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m training.warmstart", description=__doc__)
    parser.add_argument("output", type=Path, help="folder for the checkpoint")
    parser.add_argument("--minutes", type=float, default=45.0, help="wall-clock time of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32, help="traces a step")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument(
        "--eval-every", type=int, default=0, help="steps between evaluations; 0: only at the end"
    )
    train(parser.parse_args())


if __name__ == "__main__":
    main()
