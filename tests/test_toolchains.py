"""Environments that stand apart: real ones, made of small wheels, with real workers in them."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from optimize.pipeline.errors import ExitCode, RequestError, ToolchainError
from optimize.pipeline.installing import install, install_missing, remove, size_of
from optimize.pipeline.toolchain_files import Toolchain, locked, read_toolchain, toolchain_names
from optimize.pipeline.toolchains import Environment, Toolchains, probe, python_in, worker_environment
from optimize.pipeline.workers import WorkerProcess
from tests.conftest import HEADER, QUICK, Cli, Install

NAME = "tiny"
VARIABLE = "OPTIMIZE_TOOLCHAIN_TINY"
PASS = (
    HEADER
    + '''
@dataclass(frozen=True)
class Apart(Base):
    """Copies a checkpoint, and says where."""

    name: ClassVar = "apart"
    toolchain: ClassVar = "tiny"
    tools: ClassVar = ("tiny-tool",)

    def run(self, source, context, out):
        import shutil
        shutil.copytree(source.path, out, dirs_exist_ok=True)
        return {"prefix": sys.prefix, "modules": sorted({"click", "torch"} & sys.modules.keys())}
'''
)
Offer = Callable[..., Toolchain]


def write_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> str:
    """A wheel of these files and its line in a lock."""
    info = f"{name}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for inside, text in files.items():
            wheel.writestr(inside, text)
    return (
        f"{name.replace('_', '-')}=={version} \\\n    --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"
    )


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Define the toolchain `tiny`: takes fields of its file, and what its lock says beside its one wheel."""
    wheels, definitions = tmp_path / "wheels", tmp_path / "definitions"
    definitions.mkdir()
    points = "[optimize.passes]\napart = tiny_pass:Apart\n"
    files = {"tiny_tool.py": "", "tiny_pass.py": PASS, "tiny_tool-1.0.dist-info/entry_points.txt": points}
    line = write_wheel(wheels, "tiny_tool", "1.0", files)
    numpy = write_wheel(wheels, "numpy", "0.1", {"numpy.py": ""})  # which every toolchain has; workers need a real one
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("OPTIMIZE_TOOLCHAINS", str(definitions))
    monkeypatch.delenv(VARIABLE, raising=False)

    def define(lock: str | None = "", **fields: object) -> Toolchain:
        facts = {"why": "it is small", "python": ">=3.10", "provides": ["tiny-tool"], "imports": ["tiny_tool"],
                 "requirements": ["tiny-tool"]} | fields  # fmt: skip
        (definitions / f"{NAME}.toml").write_text(
            "\n".join(f"{key} = {json.dumps(value)}" for key, value in facts.items())
        )
        if lock is not None:
            (definitions / f"{NAME}.lock").write_text(
                f"# resolved\n{line}{lock if 'numpy==' in lock else numpy + lock}"
            )
        return read_toolchain(NAME)

    return define


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def reason(toolchains: Toolchains) -> str:
    with pytest.raises(ToolchainError) as caught:
        toolchains.find(NAME)
    return str(caught.value)


def test_every_shipped_toolchain_can_be_read() -> None:
    assert {"ipex", "optimum-intel", "optimum-onnx"} <= set(toolchain_names())
    for name in toolchain_names():
        toolchain = read_toolchain(name)
        assert toolchain.why
        pinned = {requirement.name for requirement, _ in locked(toolchain.lock)}
        assert set(toolchain.provides) <= pinned or toolchain.elsewhere
        assert all("--hash=sha256:" in text and "==" in text for _, text in locked(toolchain.lock))


def test_cuda_libraries_are_left_out_beside_a_cpu_build_of_torch() -> None:
    toolchain = read_toolchain("optimum-intel")
    with_cuda, without = (
        {each.name for each, _ in toolchain.wanted("3.11.7", torch)} for torch in ("2.13.0", "2.13.0+cpu")
    )
    assert without < with_cuda
    assert all(name.startswith(("nvidia-", "cuda-", "triton")) for name in with_cuda - without)
    assert {"torch", "transformers", "numpy"} <= without


@pytest.mark.parametrize(
    ("build", "pinned"),
    [("", {"==2.13.0", "==2.13.0+cpu"}), ("2.13.0", {"==2.13.0"}), ("2.13.0+cpu", {"==2.13.0+cpu"})],
)
def test_torch_is_wanted_in_the_build_that_is_there(
    build: str, pinned: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    wanted = read_toolchain("optimum-onnx").wanted("3.11.7", build)
    assert {str(each.specifier) for each, _ in wanted if each.name == "torch"} == pinned


def test_a_lock_says_what_is_wanted_for_each_python() -> None:
    versions = [[str(each.specifier) for each, _ in read_toolchain("ipex").wanted(python, "") if each.name == "numpy"]
                for python in ("3.10.4", "3.11.7")]  # fmt: skip
    assert [len(each) for each in versions] == [1, 1]
    assert versions[0] != versions[1]


def test_an_environment_is_made_found_measured_and_removed(offer: Offer, cache: Path) -> None:
    offer()
    assert reason(Toolchains(cache)).endswith("is not installed\n  run: optimize toolchain install tiny")
    said: list[str] = []
    made = install(Toolchains(cache), NAME, said.append)
    assert made == Toolchains(cache).find(NAME)
    assert made.packages["tiny-tool"] == "1.0"
    assert "torch" not in made.packages and not made.named
    assert made.python.is_relative_to(cache) and "log" in said[0]
    assert size_of(Toolchains(cache), NAME) > 10_000
    Toolchains(cache).try_imports(NAME)
    assert install(Toolchains(cache), NAME) == made  # as it is
    toolchains = Toolchains(cache)
    assert remove(toolchains, NAME) > 10_000
    assert "not installed" in reason(toolchains)
    assert not [path for path in (cache / "toolchains").iterdir() if path.is_dir()]


def test_what_has_another_hash_is_not_installed(offer: Offer, cache: Path) -> None:
    offer()
    wheels = Path(os.environ["PIP_FIND_LINKS"])
    whole = (wheels / "tiny_tool-1.0-py3-none-any.whl").read_bytes()
    write_wheel(wheels, "tiny_tool", "1.0", {"tiny_tool.py": "print('something else')"})
    with pytest.raises(ToolchainError, match=r"could not be installed(.|\n)*HASHES") as caught:
        install(Toolchains(cache), NAME)
    assert caught.value.exit_code is ExitCode.NOT_BUILT
    assert not [path for path in (cache / "toolchains").iterdir() if path.is_dir()]
    (wheels / "tiny_tool-1.0-py3-none-any.whl").write_bytes(whole)
    assert install(Toolchains(cache), NAME).packages["tiny-tool"] == "1.0"


INSTALL = """
import sys
from pathlib import Path
from optimize.pipeline.installing import install
from optimize.pipeline.toolchains import Toolchains
print(install(Toolchains(Path(sys.argv[1])), "tiny", lambda text: print(text, flush=True)).python)
"""


def start_installing(cache: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", INSTALL, str(cache)], stdout=subprocess.PIPE, text=True)


def folders(cache: Path) -> list[Path]:
    return [path for path in (cache / "toolchains").glob("*") if path.is_dir()]


def test_a_kill_leaves_nothing_that_is_used_and_the_next_try_succeeds(offer: Offer, cache: Path) -> None:
    offer()
    with start_installing(cache) as process:
        while not any((folder / "bin").exists() for folder in folders(cache)):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    (left,) = folders(cache)
    assert "not installed" in reason(Toolchains(cache))
    made = install(Toolchains(cache), NAME)
    assert made.packages["tiny-tool"] == "1.0"
    assert left not in folders(cache) and len(folders(cache)) == 1


def test_two_at_once_make_one(offer: Offer, cache: Path) -> None:
    offer()
    with start_installing(cache) as first, start_installing(cache) as second:
        answers = [process.communicate(timeout=120)[0].splitlines() for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0]
    assert answers[0][-1] == answers[1][-1]
    assert len(folders(cache)) == 1
    assert any("another process is making it" in line for lines in answers for line in lines)


def test_an_interpreter_that_vanished_is_said_and_made_anew(offer: Offer, cache: Path) -> None:
    offer()
    made = install(Toolchains(cache), NAME)
    made.python.unlink()
    assert "is broken: its interpreter does not start" in reason(Toolchains(cache))
    assert install(Toolchains(cache), NAME).python.exists()
    assert len(folders(cache)) == 1


def test_what_was_changed_by_hand_is_not_used(offer: Offer, cache: Path) -> None:
    offer()
    made = install(Toolchains(cache), NAME)
    info = next(made.python.parents[1].rglob("tiny_tool-1.0.dist-info"))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny_tool\nVersion: 2.0\n")
    assert "was changed: tiny-tool is 2.0, and locked is 1.0" in reason(Toolchains(cache))
    shutil.rmtree(info)
    assert "was changed: tiny-tool is gone" in reason(Toolchains(cache))


def test_another_lock_is_another_environment(offer: Offer, cache: Path) -> None:
    first = offer()
    made = install(Toolchains(cache), NAME)
    second = offer(lock=write_wheel(Path(os.environ["PIP_FIND_LINKS"]), "more", "1", {"more.py": ""}))
    assert first.digest != second.digest
    assert "not installed" in reason(Toolchains(cache))
    assert install(Toolchains(cache), NAME).digest != made.digest
    assert len(folders(cache)) == 2
    (cache / "toolchains" / "tiny-tool-0123456789ab-x").mkdir()  # of another toolchain
    remove(Toolchains(cache), NAME)
    assert [path.name for path in folders(cache)] == ["tiny-tool-0123456789ab-x"]


def test_no_python_that_fits_is_said(offer: Offer, cache: Path) -> None:
    offer(python=">=4")
    with pytest.raises(ToolchainError, match=rf"needs Python >=4, and here is only .*{sys.version.split()[0]}"):
        install(Toolchains(cache), NAME)


def test_a_full_disk_is_said_before_it_is_filled(offer: Offer, cache: Path) -> None:
    offer(disk=10**18)
    with pytest.raises(ToolchainError, match=r"takes 1000000000\.0 GB, and .* has .* free"):
        install(Toolchains(cache), NAME)
    assert not folders(cache)


def test_a_cache_that_cannot_be_written_is_said(offer: Offer, tmp_path: Path) -> None:
    offer()
    (tmp_path / "file").write_text("")
    with pytest.raises(ToolchainError, match="cannot be written"):
        install(Toolchains(tmp_path / "file"), NAME)


def test_what_no_registry_has_says_what_to_do(offer: Offer, cache: Path) -> None:
    offer(lock=None, elsewhere="only its maker has it")
    assert "cannot be installed here: only its maker has it\n  an interpreter that has it can be named" in reason(
        Toolchains(cache)
    )
    with pytest.raises(ToolchainError, match="only its maker has it"):
        install(Toolchains(cache), NAME)
    asked: list[Toolchain] = []
    install_missing(Toolchains(cache), [NAME], lambda each: bool(asked.append(each)), print)
    assert not asked


@pytest.mark.parametrize(
    "pointer",
    ["[]", "3", "null", '{"folder": 3, "seconds": 1, "bytes": 1}', '{"folder": "tiny"}',
     '{"folder": "../../other", "seconds": 1, "bytes": 1}', '{"folder": "FOLDER", "seconds": 1, "bytes": "x"}'],
)  # fmt: skip
def test_a_record_that_is_none_is_no_environment(offer: Offer, cache: Path, pointer: str) -> None:
    toolchains = Toolchains(cache)
    stem = toolchains.stem(offer())
    folder = stem.with_name(f"{stem.name}-abc")
    folder.mkdir(parents=True)
    (cache.parent / "other").mkdir()
    stem.with_suffix(".json").write_text(pointer.replace("FOLDER", folder.name))
    assert toolchains.made(read_toolchain(NAME)) is None
    assert "is not installed" in reason(toolchains)
    stem.with_suffix(".json").write_text(json.dumps({"folder": folder.name, "seconds": 1, "bytes": 1}))
    assert toolchains.made(read_toolchain(NAME)) == folder


def test_neither_files_of_ours_nor_settings_of_pip_say_what_is_run_or_where_it_goes(
    offer: Offer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for module in ("venv", "pip", "json"):
        Path(f"{module}.py").write_text("raise SystemExit('a file of the folder that the user is in was run')")
    for variable, value in (("TARGET", "target"), ("PREFIX", "prefix"), ("ROOT", "root"), ("DRY_RUN", "1")):
        monkeypatch.setenv(f"PIP_{variable}", str(tmp_path / value))
    assert install(Toolchains(cache), NAME).packages["tiny-tool"] == "1.0"
    assert not [path for path in ("target", "prefix", "root") if (tmp_path / path).exists()]


def test_an_environment_that_lacks_what_it_provides_is_not_used(offer: Offer, cache: Path) -> None:
    offer(provides=["tiny-tool", "Nothing_Else"])
    with pytest.raises(ToolchainError, match="does not have Nothing_Else"):
        install(Toolchains(cache), NAME)
    offer(provides=["Tiny_Tool"])  # as the registry spells it
    install(Toolchains(cache), NAME)


def test_files_of_ones_own_that_are_wrong_are_said(
    offer: Offer, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fields, message in (
        ({"disk": "big"}, "disk is not a number of bytes"),
        ({"why": 3}, "why is not a text"),
        ({"provides": "idna"}, "provides is not a list of texts"),
        ({"imports": ["a; import b"]}, "is no module"),
        ({"requirements": ["idna =="]}, "cannot be read"),
        ({"colour": "red"}, "'colour' is not a field"),
    ):
        with pytest.raises(RequestError, match=message):
            offer(**fields)
        outcome = cli("toolchain", "list")
        assert outcome.code == 0 and "unreadable" in outcome.output and "optimum-onnx" in outcome.output
    (tmp_path / "definitions" / "tiny.toml").write_text('why = "small"')
    with pytest.raises(RequestError, match="python, provides, imports, requirements is missing"):
        read_toolchain(NAME)
    offer(lock=None)
    (tmp_path / "definitions" / "tiny.lock").unlink()
    assert "tiny.lock is missing" in read_toolchain(NAME).elsewhere
    (tmp_path / "definitions" / "ti.ny.toml").write_text("")
    with pytest.raises(RequestError, match=r"'ti\.ny' is no toolchain's name"):
        toolchain_names()
    monkeypatch.setenv("OPTIMIZE_TOOLCHAINS", str(tmp_path / "gone"))
    with pytest.raises(RequestError, match="gone, which is no folder"):
        toolchain_names()


def test_a_dry_run_installs_nothing_and_nobody_is_asked_where_nobody_is(
    offer: Offer, tiny: Path, cache: Path, cli: Cli
) -> None:
    outcome = cli(tiny, "--recipe", "ipex-bf16", "--recipe", "export-onnx", "--yes", "--dry-run", "--cache", cache)
    assert outcome.code == 0 and not (cache / "toolchains").exists()
    assert f"run: optimize toolchain install ipex --cache {cache}" in outcome.output
    offer()
    outcome = cli("toolchain", "install", NAME, "--cache", cache)
    assert outcome.code == ExitCode.REFUSED and "give --yes" in outcome.output
    assert "was not there" in cli("toolchain", "remove", NAME, "--cache", cache).output
    assert cli("toolchain", "doctor", "nope", "--cache", cache).code == ExitCode.REFUSED


@pytest.mark.parametrize(("yes", "there"), [(True, True), (False, False)])
def test_nothing_is_installed_without_consent(offer: Offer, cache: Path, yes: bool, there: bool) -> None:
    offer()
    install_missing(Toolchains(cache), [NAME], lambda _: yes, print)
    assert bool(folders(cache)) is there


def test_an_interpreter_may_be_named(
    offer: Offer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(lock=None, elsewhere="only its maker has it", provides=["numpy"])
    monkeypatch.setenv(VARIABLE, sys.executable)
    found = Toolchains(cache).find(NAME)
    assert found.named and found.packages["numpy"] == np.__version__
    monkeypatch.setenv(VARIABLE, "this-python")  # on PATH
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "this-python").symlink_to(sys.executable)
    assert Toolchains(cache).find(NAME).python == tmp_path / "this-python"
    monkeypatch.setenv(VARIABLE, sys.executable)
    assert install(Toolchains(cache), NAME) == found
    assert not (cache / "toolchains").exists()


def test_of_two_distributions_of_one_name_the_one_that_is_imported_counts(tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    for folder, version in (("first", "2.0"), ("second", "1.0")):
        info = tmp_path / folder / f"twice-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: Twice\nVersion: {version}\n")
    (site / "both.pth").write_text(f"{tmp_path / 'first'}\n{tmp_path / 'second'}\n")
    assert probe(python_in(tmp_path / "env"))[1]["twice"] == "2.0"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "is not a Python that starts .*No such file"),
        ("echo hello", "is not a Python that starts"),
        ("echo 'no licence' >&2; exit 3", r"is not a Python that starts \(no licence\)"),
        ("""echo '{"python": "3.9.2", "packages": []}'""", "is Python 3.9.2, and the worker needs >=3.10"),
        ("""echo '{"python": "3.12.1", "packages": []}'""", "does not have tiny-tool, numpy"),
        ("true", "does not answer as Python does"),
        ("echo '[]'", "does not answer as Python does"),
        ("echo 7", "does not answer as Python does"),
        ("""echo '{"python": "3.12.1"}'""", "does not answer as Python does"),
    ],
)
def test_a_named_interpreter_that_does_not_serve_is_said(
    offer: Offer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, message: str
) -> None:
    offer()
    python = tmp_path / "python"
    if script is not None:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    monkeypatch.setenv(VARIABLE, str(python))
    with pytest.raises(ToolchainError, match=message):
        Toolchains(cache).find(NAME)


@pytest.mark.parametrize("text", ["why = ", 'why = "it has no other fields"', 'why = "w"\nimported = []'])
def test_a_file_that_is_wrong_is_refused(offer: Offer, text: str) -> None:
    offer()
    (Path(os.environ["OPTIMIZE_TOOLCHAINS"]) / "tiny.toml").write_text(text)
    with pytest.raises(RequestError, match=r"toolchain tiny: .*tiny\.toml and its lock cannot be read"):
        read_toolchain(NAME)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(RequestError, match="toolchain 'ipx' is not known"):
        read_toolchain("ipx")


def test_a_shipped_toolchain_cannot_be_replaced(offer: Offer, tmp_path: Path) -> None:
    offer()
    shutil.copyfile(tmp_path / "definitions" / "tiny.toml", tmp_path / "definitions" / "ipex.toml")
    with pytest.raises(RequestError, match="there is a toolchain ipex already"):
        read_toolchain("ipex")


def test_imports_that_fail_are_said(offer: Offer, cache: Path) -> None:
    offer(imports=["tiny_tool_of_another_name"])
    install(Toolchains(cache), NAME)
    with pytest.raises(ToolchainError, match=r"does not import .*ModuleNotFoundError"):
        Toolchains(cache).try_imports(NAME)


@pytest.fixture(scope="module")
def numpy_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one distribution that a worker needs."""
    folder = tmp_path_factory.mktemp("numpy")
    words = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, f"numpy=={np.__version__}"]
    subprocess.run([sys.executable, *map(str, words)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture
def apart(offer: Offer, cache: Path, numpy_wheel: Path) -> Iterator[Environment]:
    """An environment with numpy, in which workers run."""
    shutil.copy(numpy_wheel, os.environ["PIP_FIND_LINKS"])
    digest = hashlib.sha256(numpy_wheel.read_bytes()).hexdigest()
    offer(lock=f"numpy=={np.__version__} --hash=sha256:{digest}\n")
    yield install(Toolchains(cache), NAME)


def test_a_worker_sees_our_source_and_what_its_toolchain_has(apart: Environment, tmp_path: Path) -> None:
    with WorkerProcess(tmp_path / "worker.log", apart) as worker:
        assert worker.ask("gives_logits", limit=30.0) is False
    variables = worker_environment(apart, tmp_path)
    absent = "[u.find_spec(name) is None for name in ('click', 'pytest')]"
    code = f"import optimize.pipeline.worker, importlib.util as u; print({absent})"
    done = subprocess.run([apart.python, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[True, True]"


def test_a_worker_refuses_another_protocol(apart: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optimize.pipeline import workers

    monkeypatch.setattr(workers, "PROTOCOL", 999)
    with WorkerProcess(tmp_path / "worker.log", apart) as worker, pytest.raises(Exception, match="was asked in 999"):
        worker.ask("gives_logits", limit=30.0)


def test_on_the_command_line(offer: Offer, cache: Path, cli: Cli) -> None:
    offer()
    cli = partial(cli, cache=cache)
    assert cli("toolchain", "install", NAME).code == ExitCode.REFUSED  # nobody says yes
    assert not folders(cache)
    made = cli("toolchain", "install", NAME, "--yes")
    assert made.code == 0, made.output
    assert "installed: Python" in cli("toolchain", "list").output
    assert cli("toolchain", "doctor").code == 0
    next(folders(cache)[0].rglob("tiny_tool.py")).write_text("import nothing_of_that_name")
    broken = cli("toolchain", "doctor", NAME)
    assert broken.code == ExitCode.BUG and "does not import tiny_tool" in broken.output
    assert "GB freed" in cli("toolchain", "remove", NAME).output
    assert cli("toolchain", "doctor", NAME).code == ExitCode.BUG
    assert cli("toolchain", "install", "tny").code == ExitCode.REFUSED


def test_a_pass_runs_in_its_toolchain_and_the_run_says_so(
    apart: Environment, cache: Path, cli: Cli, tiny: Path, third_party: Install, some_text: Path
) -> None:
    third_party(PASS.removeprefix(HEADER), {"apart": "Apart"})
    asked = (tiny, "--recipe", "apart", "--data", some_text, *QUICK)
    outcome = cli(*asked, cache=cache)
    assert outcome.report is not None, outcome.output
    (candidate,) = outcome.report["candidates"]
    assert candidate["steps"][0]["facts"] == {"prefix": str(apart.python.parents[1]), "modules": []}
    assert outcome.code == 0, outcome.output
    facts = outcome.report["host"]["toolchains"][NAME]
    assert (facts["digest"], facts["named"], facts["packages"]["numpy"]) == (apart.digest, False, np.__version__)
    remove(Toolchains(cache), NAME)
    refused = cli(*asked, "--out", "again", cache=cache)
    assert refused.code == ExitCode.REFUSED
    assert "toolchain tiny is not installed; run: optimize toolchain install tiny" in refused.output
    again = cli(*asked, "--out", "again", "--yes", cache=cache)
    assert again.code == 0, again.output
    assert again.report is not None and again.report["candidates"][0]["steps"][0]["cached"]


def test_a_failed_step_of_a_toolchain_is_repeated_there(
    apart: Environment, cache: Path, cli: Cli, tiny: Path, third_party: Install, some_text: Path
) -> None:
    third_party(PASS.removeprefix(HEADER), {"apart": "Apart"})
    module = next(apart.python.parents[1].rglob("tiny_pass.py"))
    module.write_text(PASS.replace("import shutil", "raise ValueError('no')"))
    outcome = cli(tiny, "--recipe", "apart", "--data", some_text, *QUICK, cache=cache)
    assert outcome.code == ExitCode.NOT_BUILT
    request = outcome.output.split("optimize repeat ")[1].split()[0]
    repeated = cli("repeat", request, cache=cache)
    assert repeated.code != 0 and "ValueError: no" in repeated.output
    assert str(apart.python.parents[1]) in repeated.output  # of its traceback
