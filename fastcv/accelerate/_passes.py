"""Steps that others take up: norms, additions and activations after a convolution, norms before it, shuffles."""

from __future__ import annotations

from collections import Counter

from ._steps import CONVOLUTIONS, Listing, Step


def shorten(listing: Listing) -> int:
    """Fuse steps in place; returns how many convolutions took up."""
    _interleave(listing)
    _merge(listing)
    count = len(listing.steps)
    for fuse in (_into_producer, _norm_into_consumer):
        while fuse(listing):
            pass
    return count - len(listing.steps)


def _uses(listing: Listing) -> Counter:
    uses = Counter(value for step in listing.steps for value in step.inputs)
    uses.update(value for value, _ in listing.outputs)
    return uses


def _into_producer(listing: Listing) -> bool:
    """One affine map, addition or activation into the step whose result only it reads."""
    uses, made = _uses(listing), {step.output: i for i, step in enumerate(listing.steps)}
    for at, step in enumerate(listing.steps):
        for value in step.inputs if step.op == "add" else step.inputs[:1]:
            producer = listing.steps[made[value]] if value in made and uses[value] == 1 else None
            if producer is None or producer.activation != "none" or not _take(producer, step, value, made[value], made):
                continue
            # What it computes may now need a value that was made later: it moves to where the other stood.
            producer.output = step.output
            listing.steps[at] = producer
            del listing.steps[made[value]]
            return True
    return False


def _take(producer: Step, step: Step, value: int, at: int, made: dict[int, int]) -> bool:
    if step.op == "affine" and producer.op in CONVOLUTIONS and len(producer.inputs) == 1:
        producer.after.append(step.after[0])
    elif step.op == "affine" and producer.op == "affine":
        return False
    elif step.op == "add" and producer.op in CONVOLUTIONS and len(producer.inputs) == 1 and not step.params:
        other = step.inputs[1] if step.inputs[0] == value else step.inputs[0]
        if other == value:
            return False
        producer.inputs.append(other)
    elif step.op != "activate" or producer.op not in (*CONVOLUTIONS, "add", "mul", "affine"):
        return False
    producer.activation, producer.slope = step.activation, step.slope
    return True


def _norm_into_consumer(listing: Listing) -> bool:
    """relu(norm(x)) into the one convolution that reads it, where the matrix product serves that."""
    uses, made = _uses(listing), {step.output: i for i, step in enumerate(listing.steps)}
    for step in listing.steps:
        producer = made.get(step.inputs[0])
        if step.op != "conv" or step.before or producer is None or uses[step.inputs[0]] != 1 or step.params[6] != 1:
            continue
        norm, weight = listing.steps[producer], step.weight.get()
        small = weight.dim() == 2 or weight.shape[2:] == (1, 1)
        if norm.op == "affine" and norm.activation == "relu" and small:
            step.before, step.inputs[0] = norm.after[0], norm.inputs[0]
            del listing.steps[producer]
            return True
    return False


def _merge(listing: Listing) -> None:
    """A sum with what was resized to the other's size, as feature pyramids have it, becomes one step."""
    made = {step.output: step for step in listing.steps}
    uses, dead = _uses(listing), []
    for step in listing.steps:
        if step.op != "add" or step.params:
            continue
        for value, other in (step.inputs, step.inputs[::-1]):
            resize = made.get(value)
            if resize is None or resize.op != "resize" or uses[value] != 1 or resize.inputs[1:] != [other]:
                continue
            if not resize.params[0]:  # nearest
                step.op, step.inputs = "merge", [other, resize.inputs[0]]
                dead.append(resize)
                break
    listing.steps[:] = [step for step in listing.steps if step not in dead]


def _interleave(listing: Listing) -> None:
    """A cat of two that are shuffled afterwards becomes one step."""
    made = {step.output: i for i, step in enumerate(listing.steps)}
    uses, dead = _uses(listing), set()
    for step in listing.steps:
        if step.op == "interleave":
            cat = made[step.inputs[0]]
            step.inputs = list(listing.steps[cat].inputs)
            if uses[listing.steps[cat].output] == 1:
                dead.add(cat)
    listing.steps[:] = [step for i, step in enumerate(listing.steps) if i not in dead]
