"""Broad excepts stand at the named boundaries only, where one failure must not take the rest along."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator

from project_files import PACKAGE, functions, package_files, parse

BROAD = {"Exception", "BaseException"}

# (file in the package, function) -> what fails there, and what must go on.
BOUNDARIES = {
    (
        "managers/adapter_loader.py",
        "AdapterLoader._try",
    ): "one adapter fails to load; the scheduler's loop, and a run in training, go on",
    (
        "managers/control.py",
        "answer",
    ): "one call of the HTTP process gets an error; the scheduler's loop goes on",
    ("managers/co_trainer.py", "CoTrainer.run_quantum"): "a quantum fails its run; serving goes on",
    (
        "managers/co_trainer.py",
        "CoTrainer.poll",
    ): "a control message fails its run; the scheduler's loop goes on",
    (
        "managers/parity_request.py",
        "ParityRequest._look",
    ): "one measurement fails and says why; the next one comes, and jobs do not wait for ever",
    (
        "managers/parity_request.py",
        "ParityRequest._run",
    ): "one question to the scheduler fails; the next one comes, and jobs do not wait for ever",
    (
        "managers/scheduler.py",
        "HarliScheduler._harli_safely",
    ): "a decision or an estimate fails the run; the scheduler's loop goes on",
    (
        "managers/lora_paths.py",
        "_pickled",
    ): "a file that torch cannot read is one sentence; the start ends in order",
    (
        "managers/publisher.py",
        "Publisher._publish",
    ): "one publication is answered with an error; the next one comes",
    (
        "patches/control_requests.py",
        "_update",
    ): "an update whose content cannot be read gets an error reply; the scheduler goes on",
    (
        "patches/lora_adapter_checks.py",
        "_load_from_tensors",
    ): "a client's bytes that cannot be unpickled get an error reply; the scheduler goes on",
    ("managers/tokenizer_handover.py", "hand_over"): "no rows can be made; serving goes on",
    (
        "service/model_tokenizer.py",
        "ModelTokenizer._open",
    ): "a tokenizer that cannot be opened is refused for training with its reason; the service goes on",
    ("service/dataset.py", "_LineRows.rows"): "one line is refused; the report names the others, too",
    ("service/app.py", "App.handle"): "one request gets an error reply; the service goes on",
    ("service/peer_link.py", "PeerLink._receive"): "one message is left out; the service goes on",
    ("service/publication.py", "Publication.run"): "one adapter is tried again later; the service goes on",
    ("service/run_driver.py", "RunDriver._prepare"): "one job fails; the service goes on",
    (
        "service/subscriptions.py",
        "Subscriptions._try",
    ): "one follower has to ask again; the others and the service go on",
}


def _names(node: ast.expr | None) -> set[str]:
    if node is None:
        return {"BaseException"}
    elements = node.elts if isinstance(node, ast.Tuple) else [node]
    return {
        e.attr if isinstance(e, ast.Attribute) else e.id
        for e in elements
        if isinstance(e, ast.Attribute | ast.Name)
    }


def _re_raises(handler: ast.ExceptHandler) -> bool:
    """The handler cleans up and lets the very same exception go on."""
    return any(isinstance(n, ast.Raise) and n.exc is None for n in handler.body[-1:])


def _broad(node: ast.AST) -> Iterator[ast.AST]:
    """Broad handlers and suppressions of this function, inner functions left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.ExceptHandler) and _names(child.type) & BROAD and not _re_raises(child):
            yield child
        suppresses = isinstance(child, ast.Call) and ast.unparse(child.func).endswith("suppress")
        if suppresses and any(_names(argument) & BROAD for argument in child.args):
            yield child
        yield from _broad(child)


def test_broad_excepts_are_the_named_boundaries():
    found: Counter[tuple[str, str]] = Counter()
    for path in package_files():
        name = path.relative_to(PACKAGE).as_posix()
        tree = parse(path)
        for qualified, node in functions(tree):
            found[(name, qualified)] += sum(1 for _ in _broad(node))
        found[(name, "<module>")] += sum(1 for _ in _broad(tree))
    found = +found
    assert dict(found) == dict.fromkeys(BOUNDARIES, 1), (
        "catch the exceptions you expect by name; broad ones stand at the boundaries of BOUNDARIES only.\n"
        f"unexpected: {sorted(set(found) - set(BOUNDARIES))}, missing: {sorted(set(BOUNDARIES) - set(found))}"
    )
