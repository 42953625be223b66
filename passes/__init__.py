"""Graph passes for flat, functional ATen graphs. Knows nothing of caching; imports torch and the standard library."""

from passes.canonicalize import Canonicalize as Canonicalize
from passes.choose_attention import ChooseAttention as ChooseAttention
from passes.runner import Pass as Pass
from passes.runner import PassError as PassError
from passes.runner import PassRecord as PassRecord
from passes.runner import pass_name as pass_name
from passes.runner import run_passes as run_passes
