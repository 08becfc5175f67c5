"""What can go wrong, and the exit code that each outcome has.

The codes are a contract with build systems: documented in docs/exit-codes.md, tested, never changed without a major
version. An error's text is for its reader: what failed, on what, why, and what to do next.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    EMITTED = 0  # an artifact that passes all gates was emitted
    BUG = 1  # anything else, with a traceback
    REFUSED = 2  # the request cannot be planned, or the checkpoint cannot be used; nothing was emitted
    NOT_BUILT = 3  # every recipe failed
    NOT_ACCURATE = 4  # something was built, none is accurate enough
    NOT_FASTER = 5  # accurate, but none is faster than the gate demands, or only what may not be emitted unasked
    INCONCLUSIVE = 6  # the noise on this host hides the difference that was asked about
    WORSE = 7  # worse than the artifact it was compared with (reserved)
    INTERRUPTED = 130  # Ctrl-C or SIGTERM; the store is intact


class OptimizeError(Exception):
    """An outcome that the user can act on: printed without a traceback."""

    exit_code = ExitCode.BUG

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint  # what to do next: a command, or the name of an option

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  {self.hint}"


class RequestError(OptimizeError):
    """The request cannot be planned: bad options, data, recipe or output folder."""

    exit_code = ExitCode.REFUSED


class CheckpointError(RequestError):
    """The checkpoint is missing, damaged, unsupported or unsafe."""


class PassError(OptimizeError):
    """One step of one recipe failed. Carries the log's tail and the command that repeats the step alone."""

    exit_code = ExitCode.NOT_BUILT


class ToolchainError(OptimizeError):
    """A toolchain cannot be used here, or could not be made. In a plan it is why a recipe is left out."""

    exit_code = ExitCode.NOT_BUILT

    def __init__(self, message: str, *, hint: str | None = None, absent: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.absent = absent  # nobody has made it; not: it is broken


class WorkerError(OptimizeError):
    """A worker process died, hung past its limit, or answered with an error."""

    def __init__(
        self, message: str, *, hint: str | None = None, kind: str = "error", log_tail: str = "", worker: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        # "error" (it answered with one), "refused" (in words of its own), "memory" (a GPU's ran out), "died", "timeout"
        self.kind = kind
        self.log_tail = log_tail
        self.worker = worker  # whose it is: the name of its log


class HostError(OptimizeError):
    """This host cannot run what was built: it has another device, or none, or lacks a library."""


class OutputError(OptimizeError, ValueError):
    """Outputs that are wrong by themselves, or cannot be compared: type, shape, number, NaN."""

    exit_code = ExitCode.NOT_ACCURATE


class ArtifactError(OptimizeError):
    """An emitted or stored artifact is damaged, or is not one."""

    exit_code = ExitCode.REFUSED
