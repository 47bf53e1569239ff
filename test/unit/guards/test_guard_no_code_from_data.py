"""Nothing that comes from a wire or a file is ever run: no pickle, no eval, no loader that would
unpickle."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from support.project_files import PACKAGE, parse, relative

MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
NAMES = {"eval", "exec", "compile", "__import__"}
# Full dotted names; the part before the last dot may be an alias of the module.
CALLS = {
    "torch.load": "weights are safetensors",
    "yaml.load": "use yaml.safe_load",
    "yaml.unsafe_load": "use yaml.safe_load",
    "yaml.full_load": "use yaml.safe_load",
    "os.system": "give a list to subprocess",
    "os.popen": "give a list to subprocess",
}
SOCKET_METHODS = {"recv_pyobj", "send_pyobj"}  # pyzmq's pickling


def faults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in MODULES:
                    yield node.lineno, f"import {alias.name}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield node.lineno, f"from {node.module} import"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in NAMES or name.removeprefix("builtins.") in NAMES:
                yield node.lineno, f"{name}()"
            if name in CALLS:
                yield node.lineno, f"{name}(): {CALLS[name]}"
            if name.rsplit(".", 1)[-1] in SOCKET_METHODS:
                yield node.lineno, f"{name}()"
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                if keyword.arg == "allow_pickle" and value is not False:
                    yield node.lineno, f"{name}(allow_pickle)"
                if keyword.arg == "shell" and value is not False and name.startswith("subprocess."):
                    yield node.lineno, f"{name}(shell): give a list"


def test_the_package_runs_nothing_that_it_is_given():
    wrong = [
        f"{relative(path)}:{line}: {what}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, what in faults(parse(path))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from marshal import loads",
        "eval(text)",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "yaml.load(text, Loader=yaml.Loader)",
        "socket.recv_pyobj()",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_guard_sees(code):
    assert list(faults(ast.parse(code)))
    assert not list(faults(ast.parse("np.load(path); model.eval(); re.compile('x'); torch.compile(f)")))
