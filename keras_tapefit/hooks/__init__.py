"""Hooks on gradients, between the backward pass and the update."""

from keras_tapefit.gradients.public import publish as _publish
from keras_tapefit.hooks.base import GradientHook as GradientHook
from keras_tapefit.hooks.clipping import AdaptiveClipping as AdaptiveClipping
from keras_tapefit.hooks.clipping import BlockRMSClipping as BlockRMSClipping
from keras_tapefit.hooks.clipping import GlobalNormClipping as GlobalNormClipping
from keras_tapefit.hooks.clipping import NormClipping as NormClipping
from keras_tapefit.hooks.clipping import ValueClipping as ValueClipping
from keras_tapefit.hooks.during import During as During
from keras_tapefit.hooks.freezing import Freezing as Freezing
from keras_tapefit.hooks.freezing import GradualUnfreezing as GradualUnfreezing
from keras_tapefit.hooks.function import LambdaHook as LambdaHook
from keras_tapefit.hooks.gating import SkipNonFinite as SkipNonFinite
from keras_tapefit.hooks.gating import SkipSpikes as SkipSpikes
from keras_tapefit.hooks.gating import ZeroNonFinite as ZeroNonFinite
from keras_tapefit.hooks.hook_list import HookHandle as HookHandle
from keras_tapefit.hooks.hook_list import HookList as HookList
from keras_tapefit.hooks.learning_rates import LearningRateMultiplier as LearningRateMultiplier
from keras_tapefit.hooks.learning_rates import learning_rates_by_depth as learning_rates_by_depth
from keras_tapefit.hooks.monitoring import GradientMonitor as GradientMonitor
from keras_tapefit.hooks.monitoring import UpdateMonitor as UpdateMonitor
from keras_tapefit.hooks.noise_scale import NoiseScale as NoiseScale
from keras_tapefit.hooks.number import Number as Number
from keras_tapefit.hooks.outputs import OutputGradient as OutputGradient
from keras_tapefit.hooks.outputs import OutputMonitor as OutputMonitor
from keras_tapefit.hooks.shaping import Centralization as Centralization
from keras_tapefit.hooks.shaping import GradientNoise as GradientNoise
from keras_tapefit.hooks.shaping import GradientScaling as GradientScaling
from keras_tapefit.hooks.statistics_clipping import PercentileClipping as PercentileClipping
from keras_tapefit.hooks.statistics_clipping import ZScoreClipping as ZScoreClipping

_publish(globals())
