from . import losses as losses
from .forward import forward as forward
from .forward import probabilities as probabilities
from .losses import ClassWeights as ClassWeights
from .networks import build_model as build_model
from .networks import count_trainable as count_trainable
from .networks import initial_weights as initial_weights
from .networks import train_mode as train_mode
