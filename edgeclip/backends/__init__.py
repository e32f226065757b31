"""Backends: what an encoder runs on (ONNX Runtime, CUDA, TensorRT), and their choice on this machine."""
