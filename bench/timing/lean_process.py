"""Functions in a process that imports their module only.

One that multiprocessing starts imports the command that started it first, and torch with it, which memory
would be measured with.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from runtime.errors import BabeltowerError

__all__ = ["called_alone"]

_ROOT = Path(__file__).resolve().parents[2]
_LONGEST_ERROR = 2_000
_CODE = """
import importlib, json, sys
module, name, arguments = json.load(sys.stdin)
print(json.dumps(getattr(importlib.import_module(module), name)(*arguments)))
"""


def called_alone(module: str, function: str, *arguments: Any) -> Any:
    """Call a function of a module in a process of its own; arguments and result are JSON.

    Raises:
        BabeltowerError: it failed; with the end of its error output.
    """
    done = subprocess.run(
        [sys.executable, "-c", _CODE],
        input=json.dumps([module, function, arguments]),
        capture_output=True,
        text=True,
        check=False,
        cwd=_ROOT,
    )
    if done.returncode:
        raise BabeltowerError(f"{module}.{function}{arguments} failed: {done.stderr[-_LONGEST_ERROR:]}")
    return json.loads(done.stdout)
