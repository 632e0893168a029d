"""`report.html`: one self-contained page about a run, made from the files in its folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import yaml

from ..evaluation.accuracies import change_lines, pass_lines
from ..evaluation.summary import MEAN_OF_SETS
from ..folder import REPORT, Run, read_run, write_text
from .charts import before_after, curve
from .formats import credit_name, interval, p_value, points, responses, share, size
from .style import STYLE

GLOSSARY = {
    "waad": ("WAAD", "how far back the local heads look from this token, in tokens"),
    "fai": ("FAI", "how much the global heads of later tokens look back at this one"),
    "gamma": ("&gamma;", "the factor by which credit multiplies this token's advantage"),
}
CURVES = {  # of metrics.jsonl: caption and format
    "accuracy": ("right answers in training", "{:.0%}".format),
    "reward": ("reward", "{:.2f}".format),
    "response_tokens": ("response length, tokens", "{:.0f}".format),
    "entropy": ("entropy, nats a token", "{:.2f}".format),
    "cut_off": ("responses cut off by the length limit", "{:.0%}".format),
    "gamma_mean": ("mean gamma", "{:.3f}".format),
    "certain_share": ("near-certain tokens (entropy below 0.05 nats)", "{:.0%}".format),
    "bonus_certain_share": ("of the bonus on near-certain tokens", "{:.0%}".format),
    "bonus_entropy_ratio": ("entropy where the bonus falls, of the mean", "{:.2f}".format),
    "step_seconds": ("seconds a step", "{:.1f}".format),
}


def write_report(folder: Path) -> Path:
    """Write `report.html` from the other files of a run.

    Raises:
        RecipeError: where no finished run is in `folder`.
    """
    run = read_run(folder)
    result, config = run.result, run.config
    sections = [
        _lead(result, config),
        section("Before and after", _accuracy(result)),
        section("Learning", _curves(run)),
        section("What the gain is made of", _made_of(result)),
        section("Inside a response", _examples(result["examples"], config)),
        section("What was measured, and what it cost", _cost(result["cost"], config, result.get("processes", 1))),
        section("Settings", _settings(result, config)),
    ]
    write_text(folder / REPORT, page(f"{result['name']} · rhythm-kernels", "".join(sections)))
    return folder / REPORT


def page(title: str, body: str) -> str:
    """An HTML page without links: no files, fonts or scripts."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{escape(title)}</title><style>{STYLE}</style></head><body><main>{body}'
        "</main></body></html>\n"
    )


def table(head: list[str], body: list[list[str]]) -> str:
    """A table of cells that are HTML already; those on the left hold text, the others numbers."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in body)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def figures(charts: Mapping[str, str]) -> str:
    """Charts side by side, by caption."""
    drawn = "".join(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" for caption, svg in charts.items())
    return f'<div class="figures">{drawn}</div>'


def section(title: str, body: str) -> str:
    """A titled part of a page; empty if its body is."""
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _lead(result: dict[str, Any], config: dict[str, Any]) -> str:
    change, before, after = (result[key]["sampled"] for key in ("difference", "before", "after"))
    greedy = result["difference"]["greedy"]
    verb = "rose" if change["low"] > 0 else "fell" if change["high"] < 0 else "did not change measurably"
    moved = "" if verb.startswith("did") else f" {verb}"
    spent = result["cost"]
    tiles = [
        ("held-out, sampled", _moved_accuracy(before, after)),
        ("held-out, greedy", _moved_accuracy(*(result[key]["greedy"] for key in ("before", "after")))),
    ]
    if spent.get("measuring_seconds"):
        tiles.append(("of a step spent measuring", f"{spent['measuring_share']:.1%}"))
        tiles.append(("attention maps not made, a step", size(spent["largest_map_bytes"])))
    sentence = (
        f"Sampled accuracy on {before['instances']} held-out instances{moved or ' ' + verb}: "
        f"{points(change['difference'])} points (95% interval {interval(change['low'], change['high'])}); "
        f"{_gained(before, change)}. "
        f"Greedy: {points(greedy['difference'])} points ({interval(greedy['low'], greedy['high'])})."
    )
    if mean := change.get("mean_of_sets"):
        tiles[0] = (f"{MEAN_OF_SETS}, sampled", _moved_accuracy(before["mean_of_sets"], after["mean_of_sets"]))
        sentence += (
            f" The mean of the {len(before['sets'])} test sets, sampled: {points(mean['difference'])} points "
            f"({interval(mean['low'], mean['high'])})."
        )
    return (
        f"<header><p class='kicker'>rhythm-kernels · {escape(result['name'])}</p>"
        f"<h1>{escape(_capital(result['task']))}, {escape(credit_name(result['mode']))}</h1>"
        f"<p class='lead'>{sentence}</p><dl class='tiles'>"
        + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles)
        + "</dl></header>"
    )


def _moved_accuracy(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    return f"{before['accuracy']:.1%} → {after['accuracy']:.1%}"


def _gained(before: dict[str, Any], change: dict[str, Any]) -> str:
    """How many questions became better, and how many worse."""
    if before["samples"] == 1:
        return f"{change['gained']} became right, {change['lost']} became wrong"
    return f"{change['gained']} questions are answered rightly more often than before, {change['lost']} less often"


def _accuracy(result: dict[str, Any]) -> str:
    bars, body = [], []
    for kind in result["before"]:
        one, two, change = (result[key][kind] for key in ("before", "after", "difference"))
        bars.append((kind, one["accuracy"], one["standard_error"], two["accuracy"], two["standard_error"]))
        moved = f"{points(change['difference'])} ({interval(change['low'], change['high'])})"
        body.append([kind, share(one), share(two), moved, p_value(change["p_value"])])
    before = result["before"]["sampled"]
    note = f"The {escape(result['split'])} split, {before['instances']} instances that cannot occur in training, "
    if before["samples"] != 1:
        note += (
            f"{responses(before)} each when sampled and one greedily. A question counts by the share of its responses "
            "that are right. ± is one standard error over questions, whiskers are 95%; the difference is paired by "
            "instance, p is the exact sign-flip test."
        )
    else:
        note += (
            "one response each. ± is one binomial standard error, whiskers are 95%; the difference is paired by "
            "instance, p is McNemar's exact test."
        )
    head = ["", "before", "after", "points (95%)", "p"]
    drawn = f'<figure class="wide">{before_after(bars)}</figure>{table(head, body)}<p class="note">{note}</p>'
    return drawn + _by_set(result) + _passes(result)


def _by_set(result: dict[str, Any]) -> str:
    """Each test set, and the mean in which each counts alike."""
    drawn = ""
    for kind in result["before"]:
        if lines := change_lines(result, kind):
            head = [f"{kind}, by test set", "before", "after", "points (95%)"]
            drawn += table(head, [[escape(cell) for cell in line] for line in lines])
    return drawn


def _passes(result: dict[str, Any]) -> str:
    """The chance that one of k responses is right."""
    if not (lines := pass_lines(result, "sampled")):
        return ""
    note = (
        "pass@k is the chance that at least one of k sampled responses is right, estimated without bias from all "
        "responses (Chen et al. 2021); in brackets its 95% bootstrap interval over questions."
    )
    return f'{table(["sampled", "before", "after"], lines)}<p class="note">{note}</p>'


def _curves(run: Run) -> str:
    if not run.lines:
        return ""
    grpo = run.config["grpo"]
    batches = max(grpo["gradient_accumulation_steps"], grpo["steps_per_generation"])
    batch = grpo["per_device_train_batch_size"] * batches * run.result.get("processes", 1)
    charts = {}
    for key, (caption, show) in CURVES.items():
        found = run.series(key)
        if not found or (key == "reward" and grpo["rewards"] == ["correctness"]):
            continue  # the reward is the accuracy, shown already
        steps, values = list(found), list(found.values())
        error = [math.sqrt(v * (1 - v) / batch) for v in values] if key == "accuracy" else None
        floor = 1.0 if key == "gamma_mean" else 0.0
        charts[caption] = curve(steps, values, label=caption, show=show, error=error, floor=floor)
    note = (
        f"A dot is one step ({batch} sampled responses to training instances), the line a running mean of five; "
        "the band is one binomial standard error."
    )
    return f'{figures(charts)}<p class="note">{note}</p>'


def _made_of(result: dict[str, Any]) -> str:
    before, after = result["before"]["sampled"], result["after"]["sampled"]
    if "figures" not in before:
        return ""
    body = [_moved("tokens a response", before["tokens"], after["tokens"], "{:.1f}".format)]
    for key, figure in before["figures"].items():
        show = ("{:.1%}" if figure["share"] else "{:.2f}").format
        body.append(_moved(figure["name"], figure["value"], after["figures"][key]["value"], show))
    head = ["sampled responses", "before", "after", "ratio"]
    remark = f"<p>{escape(result['remark'])}</p>" if result["remark"] else ""
    return f"{remark}{table(head, body)}"


def _moved(name: str, before: float, after: float, show: Callable[[float], str]) -> list[str]:
    """A line of a table: a figure before and after, and by what it was multiplied."""
    return [escape(name), show(before), show(after), f"&times; {after / before:.2f}" if before > 0 else ""]


def _examples(examples: list[dict[str, Any]], config: dict[str, Any]) -> str:
    if not examples:
        return ""
    tabs = "".join(
        f'<input type="radio" name="example" id="e{i}"{" checked" if i == 0 else ""}><label for="e{i}">'
        f"{escape(e['label'])}</label>"
        for i, e in enumerate(examples)
    )
    colours = "".join(
        f'<input type="radio" name="colour" id="by-{key}"{" checked" if key == "gamma" else ""}>'
        f'<label for="by-{key}"><i class="swatch {key}"></i>{name}: {meaning}</label>'
        for key, (name, meaning) in reversed(GLOSSARY.items())
    )
    rhythm = config["rhythm"]
    first, last = rhythm["horizon"]
    horizon = f"{first} tokens to the end of the response" if last is None else f"{first} to {last} tokens"
    note = (
        f"Held-out responses of the trained model, measured in one forward pass: W = {rhythm['window']}, horizon "
        f"{horizon}, &gamma; in mode {examples[0]['mode']}. Bars "
        "below each token, from the top: WAAD and FAI (of the response's largest), &gamma; &minus; 1. The words are "
        "coloured by the measure chosen above; a pointer over a word shows its numbers."
    )
    tapes = "".join(f'<div class="example x{i}">{_tape(example)}</div>' for i, example in enumerate(examples))
    return f'<div class="examples">{tabs}<div class="legend">{colours}{tapes}</div></div><p class="note">{note}</p>'


def _tape(example: dict[str, Any]) -> str:
    most = {name: max(max(example[name]), 1e-9) for name in ("waad", "fai")}
    bonus = max(max(example["gamma"]) - 1, 1e-9)
    cells = []
    for i, token in enumerate(example["tokens"]):
        waad, fai, gamma = (example[name][i] for name in ("waad", "fai", "gamma"))
        shares = (waad / most["waad"], fai / most["fai"], max(0.0, gamma - 1) / bonus)
        style = ";".join(f"--{name}:{share:.3f}" for name, share in zip("wfg", shares))
        title = f"{escape(token)}  (token {i + 1})&#10;WAAD {waad:.2f}&#10;FAI {fai:.4f}&#10;&gamma; {gamma:g}"
        cells.append(
            f'<span class="t" style="{style}" title="{title}"><b>{escape(token)}</b>'
            '<i class="waad"></i><i class="fai"></i><i class="gamma"></i></span>'
        )
    verdict = "right" if example["right"] else "wrong"
    before = "right" if example["right_before"] else "wrong"
    return (
        f'<p class="prompt"><code>{escape(example["prompt"])}</code> <span class="{verdict}">{verdict}</span></p>'
        f'<div class="tape">{"".join(cells)}</div><p class="prompt was">before training <span class="{before}">{before}'
        f"</span>: <code>{escape(example['before']) or '(empty)'}</code></p>"
    )


def _cost(cost: dict[str, Any], config: dict[str, Any], processes: int) -> str:
    if not cost:
        return ""
    body = [["a step, generation included", f"{cost['step_seconds']:.2f} s"]]
    if cost["measuring_seconds"]:
        body += [
            ["measuring WAAD and FAI and the credit, in that", f"{cost['measuring_seconds'] * 1e3:.1f} ms"],
            ["share of the step", f"{cost['measuring_share']:.2%}"],
            ["grouping the heads, once", f"{cost['calibration_seconds']:.2f} s"],
        ]
        did_not = "full attention maps of the largest batch, float32, all layers and heads: <em>not made</em>"
        tokens = config["grpo"]["per_device_train_batch_size"] * cost["largest_row_tokens"]
        body += [
            [did_not, size(cost["largest_map_bytes"])],
            ["the same over the whole run", size(cost["all_map_bytes"])],
            ["kept instead: two numbers a token", size(8 * tokens)],
        ]
        text = (
            "No forward was added but the one that grouped the heads: q, k and the log-sum-exp are those of the "
            "training forward, read band by band inside each attention call. The map sizes are computed, not measured: "
            "what <code>output_attentions=True</code> would have returned."
        )
    else:
        text = "This run measured nothing: its credit needs no attention."
    text += f" The figures are those of one of {processes} processes, the main one." if processes > 1 else ""
    return f"<p>{text}</p>{table(['', ''], body)}"


def _settings(result: dict[str, Any], config: dict[str, Any]) -> str:
    shown = yaml.safe_dump(config, sort_keys=False)
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    seconds = result["seconds"]
    return (
        f"<p>{result['parameters']:,} parameters, {result['steps']} steps, seed {result['seed']}; "
        f"{seconds['total'] / 60:.1f} minutes in all, {seconds['training'] / 60:.1f} of them training. "
        f"{escape(versions)}.</p><details><summary>config.yaml</summary><pre>{escape(shown)}</pre></details>"
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
