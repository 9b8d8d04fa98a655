"""Registries of protune_mm, children of mmengine's.

mmengine imports this module by itself for any type with the prefix ``protune_mm.``, so configs
need no ``custom_imports``.
"""

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_CONSTRUCTORS
from mmengine.registry import PARAM_SCHEDULERS as MMENGINE_SCHEDULERS
from mmengine.registry import RUNNERS as MMENGINE_RUNNERS
from mmengine.registry import STRATEGIES as MMENGINE_STRATEGIES
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

from . import compat  # noqa: F401  (its effect is wanted before any model is built)

MODELS = Registry(
    'model', parent=MMENGINE_MODELS, scope='protune_mm', locations=['protune_mm.factory']
)
DATASETS = Registry(
    'dataset',
    parent=MMENGINE_DATASETS,
    scope='protune_mm',
    locations=['protune_mm.datasets', 'protune_mm.robustness'],
)
HOOKS = Registry(
    'hook',
    parent=MMENGINE_HOOKS,
    scope='protune_mm',
    locations=[
        'protune_mm.hooks',
        'protune_mm.checkpoints',
        'protune_mm.files',
        'protune_mm.resume',
        'protune_mm.sharded_runner',
        'protune_mm.show',
    ],
)
LOOPS = Registry(
    'loop', parent=MMENGINE_LOOPS, scope='protune_mm', locations=['protune_mm.robustness']
)
METRICS = Registry(
    'metric', parent=MMENGINE_METRICS, scope='protune_mm', locations=['protune_mm.robustness']
)
TRANSFORMS = Registry(
    'transform', parent=MMENGINE_TRANSFORMS, scope='protune_mm', locations=['protune_mm.robustness']
)
RUNNERS = Registry(
    'runner',
    parent=MMENGINE_RUNNERS,
    scope='protune_mm',
    locations=['protune_mm.runner', 'protune_mm.sharded_runner'],
)
STRATEGIES = Registry(
    'strategy', parent=MMENGINE_STRATEGIES, scope='protune_mm', locations=['protune_mm.sharded']
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_CONSTRUCTORS,
    scope='protune_mm',
    locations=['protune_mm.optim'],
)
PARAM_SCHEDULERS = Registry(
    'parameter scheduler',
    parent=MMENGINE_SCHEDULERS,
    scope='protune_mm',
    locations=['protune_mm.optim'],
)
PROMPTS = Registry('prompt', scope='protune_mm', locations=['protune_mm.prompts'])
"""Prompt types. A class here takes ``channels`` and ``zero_init`` besides its own options."""


def type_name(config: dict) -> str:
    """Last part of a config's type, a name or, in newer configs, a class; '' without one."""
    kind = config.get('type', '')
    return getattr(kind, '__name__', str(kind)).rpartition('.')[2]
