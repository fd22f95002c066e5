"""The table that a run prints of its datasets before it starts: weights, samples, epochs."""

from megatron_deepseek.data.blend import short_names
from megatron_deepseek.data.data_plan import SplitPlan

MOST_ROWS = 40


def describe_split(name: str, plan: SplitPlan, most_rows: int = MOST_ROWS) -> list[str]:
    """Return a line on the whole split, and for a blend a row for each dataset.

    Of more than `most_rows` datasets only the heaviest are shown. Samples are those of the whole run, weight x samples,
    from which the blend departs by one at most.
    """
    sources, seq_length = plan.sources, plan.sources[0].seq_length
    tokens = sum(source.tokens for source in sources)
    epoch = sum(source.num_samples for source in sources)
    lines = [f"{name} data: {_count(len(sources), 'dataset')} of {tokens:,} tokens; {plan.num_samples:,} samples of "
             f"{seq_length:,} tokens are {plan.num_samples / epoch:.2f} epochs"]
    if plan.left_out:
        lines.append(f"  without {_count(len(plan.left_out), 'dataset')} whose share is less than a sample: "
                     f"{', '.join(plan.left_out[:5])}{', ...' * (len(plan.left_out) > 5)}")
    if len(sources) == 1:
        return lines
    rows = list(zip(short_names([source.prefix for source in sources]), sources, plan.weights))
    shown = rows if len(rows) <= most_rows else sorted(rows, key=lambda row: -row[2])[:most_rows]
    width = max(len("dataset"), *(len(row[0]) for row in shown))
    columns = f"{'tokens':>17}  {'of tokens':>9}  {'weight':>8}  {'samples':>13}  {'epochs':>9}"
    lines.append(f"  {'dataset':{width}}  {columns}")
    for label, source, weight in shown:
        samples = weight * plan.num_samples
        lines.append(f"  {label:{width}}  {source.tokens:>17,}  {source.tokens / tokens:>9.3%}  {weight:>8.3%}  "
                     f"{samples:>13,.0f}  {samples / source.num_samples:>9.3f}")
    if len(shown) < len(rows):
        left = sum(row[2] for row in rows) - sum(row[2] for row in shown)
        lines.append(f"  and {_count(len(rows) - len(shown), 'dataset')} more, of weight {left:.3%} together")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
