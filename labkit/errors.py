"""Errors a learner can act on: what happened, why, and what to do next."""


class LabError(Exception):
    """An error in three sentences: `what` happened, `why`, and what to do `next`.

    In a notebook it shows as these sentences, without a traceback: IPython asks an
    exception for `_render_traceback_` before it draws its own.
    """

    def __init__(self, what: str, why: str = "", next: str = "") -> None:
        self.what, self.why, self.next = what, why, next
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"Why:  {self.why}")
        if self.next:
            lines.append(f"Next: {self.next}")
        return "\n".join(lines)

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class WeightsError(LabError):
    """The model's files are not there, not whole, or not a checkpoint."""


class SettingsError(LabError):
    """A setting is unknown, ill-typed or out of range."""


class EngineError(LabError):
    """The engine in this kernel did not start, or is no longer there."""


class ServerError(LabError):
    """A server did not start, does not answer, or is not ours."""


class ChatError(LabError):
    """A chat request could not be made or was refused."""


class ToolError(LabError):
    """A function or server cannot be offered to a model as a tool."""


class RunError(LabError):
    """A run of notebooks cannot be started as asked."""
