"""Resolve the locks of toolchains anew: `python targets/toolchains/relock.py [NAME ...]`, where `uv` is on PATH.

Each lock holds for every Python that the toolchain's file names, on Linux, and has the hashes of all files of each
version that the registry offers. torch's CPU builds lie elsewhere, under versions of their own: those that were tried
are added, and taken where pip finds them. What only a CUDA build needs is locked too, and left out beside a CPU build.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import tomllib

HERE = Path(__file__).parent
OPTIONS = ("--generate-hashes", "--universal", "--no-annotate", "--no-header", "--no-emit-package", "torchvision")
BUILT_FOR = "python_version == '3.11' and platform_machine == 'x86_64' and sys_platform == 'linux'"
CPU_BUILDS = {"2.13.0": "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"}


def lock(name: str) -> None:
    """Write NAME.lock from the requirements in NAME.toml, which may lie in a folder of OPTIMIZE_TOOLCHAINS."""
    folders = [HERE, *map(Path, filter(None, os.environ.get("OPTIMIZE_TOOLCHAINS", "").split(os.pathsep)))]
    files = [folder / f"{name}.toml" for folder in folders]
    file = next((each for each in files if each.is_file()), None)
    if file is None:
        sys.exit(f"none of {', '.join(map(str, files))} is there")
    facts = tomllib.loads(file.read_text())
    oldest = facts["python"].partition(">=")[2].partition(",")[0]
    words = ["uv", "pip", "compile", *OPTIONS, "--python-version", oldest, "-"]
    asked = "\n".join(facts["requirements"])
    text = subprocess.run(words, input=asked, capture_output=True, text=True, check=True).stdout
    for version, digest in CPU_BUILDS.items():
        build = f"torch=={version}+cpu ; {BUILT_FOR} --hash=sha256:{digest}"
        text = re.sub(rf"(?m)^(?=torch=={re.escape(version)} )", build + "\n", text)
    file.with_suffix(".lock").write_text(text)


if __name__ == "__main__":
    if shutil.which("uv") is None:
        sys.exit("uv is not on PATH: pip install uv, in an environment of its own")
    files = sorted(HERE.glob("*.toml"))
    resolved = [path.stem for path in files if tomllib.loads(path.read_text()).get("requirements")]
    for each in sys.argv[1:] or resolved:
        lock(each)
