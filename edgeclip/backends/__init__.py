"""Backends of encoders (ONNX Runtime, CUDA, TensorRT), and their selection on this machine."""
