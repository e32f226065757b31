"""ONNX graphs: encoders, prior, fused classifier, and their conversion to other precisions."""
