"""Prompt types, one file each; importing the package registers them."""

from .adapter import Adapter
from .conv_adapter import ConvAdapter
from .lora import LoRA
from .lorand import LoRand
from .mona import Mona
from .pro_tuning import ProTuningBlock
from .scale_shift import ScaleShift

__all__ = ['Adapter', 'ConvAdapter', 'LoRA', 'LoRand', 'Mona', 'ProTuningBlock', 'ScaleShift']
