from . import losses as losses
from .forward import autocast as autocast
from .forward import model_input as model_input
from .losses import ClassWeights as ClassWeights
from .networks import build_model as build_model
from .networks import count_trainable as count_trainable
from .networks import train_mode as train_mode
