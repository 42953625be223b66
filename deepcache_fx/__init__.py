"""deepcache_fx: DeepCache as a graph transformation, compiled. See `optimize`."""

from deepcache_fx.api import begin as begin
from deepcache_fx.api import condition as condition
from deepcache_fx.api import optimize as optimize
from deepcache_fx.api import optimized as optimized
from deepcache_fx.api import report as report
from deepcache_fx.api import reset as reset
from deepcache_fx.api import restore as restore
from deepcache_fx.api import step as step
from deepcache_fx.calibrate import calibrate as calibrate
from deepcache_fx.calibrated import Calibrated as Calibrated
from deepcache_fx.draw import draw as draw
from deepcache_fx.errors import BranchError as BranchError
from deepcache_fx.errors import CaptureError as CaptureError
from deepcache_fx.errors import CompileError as CompileError
from deepcache_fx.errors import DeepCacheError as DeepCacheError
from deepcache_fx.errors import FakeTensorError as FakeTensorError
from deepcache_fx.errors import OptionError as OptionError
from deepcache_fx.errors import ScheduleError as ScheduleError
from deepcache_fx.only import Only as Only
from deepcache_fx.plan import BranchPlan as BranchPlan
from deepcache_fx.plan import Plan as Plan
from deepcache_fx.plan import plan as plan
from deepcache_fx.report import Report as Report
from deepcache_fx.schedule import Nested as Nested
from deepcache_fx.schedule import Power as Power
from deepcache_fx.schedule import Schedule as Schedule
from deepcache_fx.schedule import Steps as Steps
from deepcache_fx.schedule import Uniform as Uniform
from deepcache_fx.schedule import Window as Window
from passes.approximate import MergeTokens as MergeTokens

__version__ = "0.1.0"
