from . import decoding as decoding
from .app import build_app as build_app
from .served_model import ModelInfo as ModelInfo
from .served_model import ServedModel as ServedModel
from .served_model import load_served as load_served
from .service import Service as Service
