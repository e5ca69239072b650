"""What the package may not do, read from its source, and what it does not do, seen from outside."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wsipipe.errors import ModelError
from wsipipe.model import weights
from wsipipe.model.weights import load_model

PACKAGE = Path(__file__).parents[1] / "wsipipe"
# What runs text or builds the objects of a pickle; None: never, else the arguments with which alone it is safe.
CALLS: dict[str, dict[str, object] | None] = {
    "eval": None, "exec": None, "os.system": None, "os.popen": None, "pickle.load": None, "pickle.loads": None,
    "yaml.load": None, "yaml.unsafe_load": None, "yaml.full_load": None, "joblib.load": None, "shelve.open": None,
    "marshal.loads": None, "tempfile.mktemp": None, "torch.hub.load": None, "torch.jit.load": None,
    "torch.load": {"weights_only": True}, "np.load": {"allow_pickle": False},
}  # fmt: skip


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_text_is_run_and_no_pickle_is_built(path: Path) -> None:
    for call in calls(path):
        given = {keyword.arg: getattr(keyword.value, "value", ...) for keyword in call.keywords}
        assert given.get("shell", False) is False, f"line {call.lineno}: a shell would read the names of files"
        name = ast.unparse(call.func)
        if name in CALLS:
            safe = CALLS[name]
            assert safe is not None, f"line {call.lineno}: {name}"
            assert {key: given.get(key) for key in safe} == safe, f"line {call.lineno}: {name} without {safe}"


def test_shipped_weights_that_were_changed_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(weights.SHIPPED, tmp_path / "weights")
    monkeypatch.setattr(weights, "SHIPPED", tmp_path / "weights")
    load_model(weights.DEFAULT_MODEL)
    path = tmp_path / "weights" / f"{weights.DEFAULT_MODEL}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"is not as shipped.*install wsipipe anew"):
        load_model(weights.DEFAULT_MODEL)


def test_every_shipped_model_is_whole_and_has_a_card_and_all_of_them_are_small() -> None:
    shipped = weights.shipped_models()
    assert sorted(shipped) == ["cellvta-nano", "cellvta-small"]
    for name, path in shipped.items():
        assert load_model(name)[1].name == name
        card = path.with_suffix(".md").read_text(encoding="utf-8")
        assert card.startswith(f"# {name}\n")
        assert "not for diagnosis" in card
    assert sum(path.stat().st_size for path in shipped.values()) < 60e6


OFFLINE = """
import importlib, pkgutil, sys
from pathlib import Path

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind", "socket.sendto"):
        raise SystemExit(f"{event} {arguments[1:]}")

sys.addaudithook(refuse)
sys.path.insert(0, sys.argv.pop(1))
import wsipipe
for module in pkgutil.walk_packages(wsipipe.__path__, "wsipipe."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
import conftest
from wsipipe import cli
from wsipipe.model import registry
registry.ARCHITECTURES["oracle"] = conftest.ColourOracle
cli.main()
"""


def test_no_network_is_used_at_import_or_run(tiny, oracle, tmp_path) -> None:
    command = [sys.executable, "-c", OFFLINE, str(Path(__file__).parent), "segment", str(tiny.path)]
    command += ["--model", str(oracle), "-o", str(tmp_path / "out"), "--device", "cpu"]
    if shutil.which("unshare") and not subprocess.run(["unshare", "-n", "true"], check=False).returncode:
        command = ["unshare", "-n", *command]  # not even what is below Python has one
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=580)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "12 nuclei" in done.stdout
