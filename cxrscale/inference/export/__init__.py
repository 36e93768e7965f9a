"""Exported models: a run's weights as an ONNX file or a program of torch.export, quantized or not, and what runs them.

onnx and onnxruntime are imported here alone, by whoever needs them: the extra `export` installs them.
"""
