"""The errors a user may see. All of them are `DeepCacheError`s."""


class DeepCacheError(Exception):
    """Something deepcache_fx refuses or cannot do; the message names the value and the remedy."""


class CaptureError(DeepCacheError):
    """The model could not be captured as one graph."""


class Uncapturable(CaptureError):
    """The model does more than return a result, which a graph would not: its calls run uncached."""


class FakeTensorError(DeepCacheError, TypeError):
    """A tensor without values came in: something left it behind when it traced the model."""


class BranchError(DeepCacheError, ValueError):
    """The model has no such skip connection."""


class ScheduleError(DeepCacheError, ValueError):
    """A schedule is malformed, or lacks the number of denoising steps it needs."""


class OptionError(DeepCacheError, ValueError):
    """An option has a value that makes no sense."""


class CompileError(DeepCacheError):
    """A captured variant could not be compiled."""
