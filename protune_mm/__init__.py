"""Pro-tuning for MMDetection, MMSegmentation and MMPretrain."""

from .checkpoints import tuned_state_dict
from .config import load_config, overlay, protune_config
from .factory import ProTuned
from .inject import protune
from .merge import merge
from .prompt_sets import PromptSets
from .tuned import tuned_parameters
from .version import __version__

__all__ = [
    'ProTuned',
    'PromptSets',
    '__version__',
    'load_config',
    'merge',
    'overlay',
    'protune',
    'protune_config',
    'tuned_parameters',
    'tuned_state_dict',
]
