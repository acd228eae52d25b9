"""Training: of reference models, and of quantized potentials by fake quantization."""
