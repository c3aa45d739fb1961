"""What importing costs, and what it says where torch is missing."""

from __future__ import annotations

import subprocess
import sys

WITHOUT_TORCH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" or name.startswith("torch."):
            raise ModuleNotFoundError(f"No module named {name!r}", name="torch")
sys.meta_path.insert(0, Blocked())
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_importing_hasten_imports_nothing_heavy() -> None:
    heavy = "('torch', 'transformers', 'tokenizers', 'numpy', 'rich')"
    code = f"import hasten, sys; print([m for m in {heavy} if m in sys.modules])"
    done = python(code)
    assert done.stdout.strip() == "[]", done.stderr


def test_without_torch_the_import_says_what_to_do() -> None:
    code = WITHOUT_TORCH + (
        "import hasten\n"
        "for name in hasten.__all__:\n"
        "    try:\n"
        "        getattr(hasten, name)\n"
        "    except ModuleNotFoundError as error:\n"
        "        assert 'pip install torch' in str(error), error\n"
        "        print(name)\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert {"LLM", "AsyncLLM"} <= set(done.stdout.split())


def test_without_torch_the_command_says_what_to_do() -> None:
    code = WITHOUT_TORCH + (
        "sys.argv = ['hasten', 'generate', 'x']\nfrom hasten.cli.main import main\nmain()\n"
    )
    done = python(code)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("hasten: ") and done.stderr.count("\n") == 1
    assert "pip install torch" in done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    done = python("import hasten; hasten.Nothing")
    assert "module 'hasten' has no attribute 'Nothing'" in done.stderr
