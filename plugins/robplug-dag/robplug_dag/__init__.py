"""Dense Adversary Generation: adversarial examples for segmentation and detection, and its kernels."""
