"""What the published package DeepCache offers, under its names: change the import, and nothing else.

May import: api and what it may.
Start reading at `helper.DeepCacheSDHelper`, then `pipelines`.
"""

from deepcache_fx.compat.helper import DeepCacheSDHelper as DeepCacheSDHelper
from deepcache_fx.compat.pipelines import StableDiffusionImg2ImgPipeline as StableDiffusionImg2ImgPipeline
from deepcache_fx.compat.pipelines import StableDiffusionInpaintPipeline as StableDiffusionInpaintPipeline
from deepcache_fx.compat.pipelines import StableDiffusionPipeline as StableDiffusionPipeline
from deepcache_fx.compat.pipelines import StableDiffusionXLImg2ImgPipeline as StableDiffusionXLImg2ImgPipeline
from deepcache_fx.compat.pipelines import StableDiffusionXLInpaintPipeline as StableDiffusionXLInpaintPipeline
from deepcache_fx.compat.pipelines import StableDiffusionXLPipeline as StableDiffusionXLPipeline
from deepcache_fx.compat.pipelines import StableVideoDiffusionPipeline as StableVideoDiffusionPipeline
