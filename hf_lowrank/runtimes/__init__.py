"""What runs a compressed model where there is no torch: ONNX Runtime and OpenVINO."""
